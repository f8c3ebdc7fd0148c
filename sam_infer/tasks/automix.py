"""`sam_auto_mix`: as `sam_auto_cam`, with a SAM that learned together with the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine
from sam_infer.library import ImageLibrary
from sam_infer.published import PublishedModel
from sam_infer.tasks.autocam import answer_cam, parse_cam
from sam_infer.tasks.published import PublishedTask
from sam_infer.tasks.reply import LabelmapFile
from sam_infer.tasks.servedsam import ServedSam
from sam_infer.tuning.mixfile import MixModel, load_mix


class AutoMixInfer(PublishedTask[MixModel]):
    """Masks of the project's labels without a prompt from anyone, by a SAM that learned to be prompted so.

    After Ward and Imran (SAM-Mix, arXiv 2412.08575): the classifier's activation map gives a box and is added
    to SAM's image embedding. As in training SAM sees whole slices. What is served follows the published file.

    Request: as `sam_infer.tasks.autocam.AutoCamInfer`, but for ``zoom``; ``cam_threshold`` is by default the
    one that the model learned with.

    Args:
        path: The file that the training loop publishes.
        base: The SAM that was tuned.
        store: Embeddings of the base on disk, used where its encoder stood still; None = they are kept in
            memory only.
        library: Reads images.
        labels: The project's labels, name to value.
        minimum: Accepted cases that a first training needs, for the description.
        embedding_bytes: Limit of the embeddings in memory.
    """

    def __init__(
        self,
        *,
        path: Path | str,
        base: SamEngine,
        store: EmbeddingStore | None = None,
        library: ImageLibrary,
        labels: Mapping[str, int],
        minimum: int = 4,
        embedding_bytes: int = 256 << 20,
    ) -> None:
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description=f"A classifier's activation maps prompt a {base.name} that learned with it",
            config={
                "presence_threshold": "",
                "cam_threshold": "",
                "cam_every_part": False,
                "output_uncertainty": False,
                "window_level": "",
                "window_width": "",
            },
        )
        self.path = Path(path)
        self._base = base
        self._store = store
        self._library = library
        self._labels = dict(labels)
        self._embedding_bytes = embedding_bytes
        self._served = PublishedModel(
            path, load=self._load, labels=labels, train="POST /train/sam_mix", minimum=minimum
        )

    def _load(self, path: Path) -> ServedSam[MixModel]:
        model = load_mix(path, self._base, device=str(self._base.device))
        return ServedSam.of(model, self._base, store=self._store, embedding_bytes=self._embedding_bytes)

    def get_path(self, validate: bool = True) -> str | None:
        """The file; None where it is asked to exist and does not."""
        return str(self.path) if self.path.is_file() or not validate else None

    def current(self) -> tuple[MixModel | None, str]:
        """The published model and "", or None and what to do."""
        served, reason = self._served.current()
        return (None, reason) if served is None else (served.model, "")

    def fingerprint(self) -> str:
        """Of the published file, and of the base.

        Raises:
            InputError: (409) While nothing is published for the project's labels.
        """
        return f"{self.published('sam_auto_mix').fingerprint} {self._base.fingerprint}"

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Returns:
            As `sam_infer.tasks.autocam.AutoCamInfer.answer`.

        Raises:
            InputError: (409) While nothing is published for the project's labels; (400) for a parameter.
        """
        served = self._served.required("sam_auto_mix")
        model = served.model
        return answer_cam(
            request,
            model.classifier,
            encoder=served.encoder,
            library=self._library,
            options=parse_cam(request, self._labels, threshold=model.cam_threshold, attention=True),
            zoom=False,
            name="mix",
        )
