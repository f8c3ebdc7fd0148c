"""`sam_auto_text`: automatic prompts and the labels' texts, answered by the SAM that `preference` trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam_infer.autotext import auto_text
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.parts import PartsAnswer, mean_iou
from sam_infer.prompters import Prompter
from sam_infer.prompts.request import parse_flag, parse_names
from sam_infer.published import PublishedModel
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.published import PublishedTask
from sam_infer.tasks.reply import LabelmapFile, make_reply
from sam_infer.tasks.servedsam import ServedSam
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.text.labeltexts import LabelTexts
from sam_infer.tuning.tunedfile import TunedSam, load_tuned
from sam_infer.uncertainty import mean_by_label

_EMBEDDINGS = 256 << 20


class AutoTextInfer(PublishedTask[TunedSam]):
    """Masks of the project's labels without a prompt from anyone; see `sam_infer.autotext`.

    Request: ``image`` (path), ``labels`` or ``label`` (names to look for; all by default),
    ``output_uncertainty``, ``window_level``, ``window_width``, ``result_extension``, ``result_compress``,
    ``result_region``.

    Args:
        path: The weights file that the training loop publishes.
        base: The SAM that it was tuned on.
        store: The base's embeddings on disk; None where none are kept.
        prompters: Where prompts come from, by name; each raises an `InputError` (409) where it is not there.
        texts: Gives what embeds texts about labels; raises an `InputError` (409) where it is not there.
        library: Reads images.
        labels: The project's labels, name to value.
        minimum: Accepted cases that a first training needs, for the description.
    """

    def __init__(
        self,
        *,
        path: Path | str,
        base: SamEngine,
        store: EmbeddingStore | None,
        prompters: Mapping[str, Callable[[], Prompter]],
        texts: Callable[[], LabelTexts],
        library: ImageLibrary,
        labels: Mapping[str, int],
        minimum: int = 4,
    ) -> None:
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description=f"Automatic prompts and the labels' descriptions for a tuned {base.name}",
            config={"output_uncertainty": False, "window_level": "", "window_width": ""},
        )
        self.path = Path(path)
        self._base = base
        self._store = store
        self._prompters = prompters
        self._texts = texts
        self._library = library
        self._labels = dict(labels)
        self._published = PublishedModel(
            path, load=self._load, labels=labels, train="POST /train/preference", minimum=minimum
        )

    def _load(self, path: Path) -> ServedSam[TunedSam]:
        model = load_tuned(path, self._base)
        return ServedSam.of(model, self._base, store=self._store, embedding_bytes=_EMBEDDINGS)

    def get_path(self, validate: bool = True) -> str | None:
        """The weights file; None where it is asked to exist and does not."""
        return str(self.path) if self.path.is_file() or not validate else None

    def current(self) -> tuple[TunedSam | None, str]:
        """The published model and "", or None and what to do."""
        served, reason = self._published.current()
        return (None, reason) if served is None else (served.model, "")

    def fingerprint(self) -> str:
        """Of the published model and of what prompts it.

        Raises:
            InputError: (409) While there is none, it cannot be prompted, or its texts have changed.
        """
        model = self.published("sam_auto_text")
        self._said(model)
        return f"{self._base.digest} {model.fingerprint} {self._prompter(model).fingerprint}"

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Returns:
            The label map, and: label_names (name to value, the classes present); score, the mean predicted
            IoU; objects, by label: its score, the slices that were prompted, and by slice the boxes in slice
            pixels, score and agreement (Dice of the mask with what prompted it); missing, by label why
            there is none; prompts, where they are from; texts, what was said by label; uncertainty
            (mean of each class present, 0..1) where it was asked for.

        Raises:
            InputError: (409) While no model is published for the project's labels, its prompts are not to be
                had, or its texts were embedded otherwise; (400) for a parameter.
        """
        watch = Stopwatch()
        served = self._published.required("sam_auto_text")
        model, prompter = served.model, self._prompter(served.model)
        texts = self._said(model)
        uncertain = parse_flag("output_uncertainty", request.get("output_uncertainty"))
        names = parse_names(request, self._labels)
        image = self._library.read(request["image"], transient=bool(request.get("transient")))
        window = self._library.window_for(image, request)
        watch.mark("load")
        found = auto_text(
            image,
            model,
            prompter,
            encoder=served.encoder,
            window=window,
            texts=texts,
            labels=names,
            uncertainty=uncertain,
        )
        watch.mark("segment")
        labelmap, present = numbered(found.labelmap, self._labels, request)
        file, facts = make_reply(labelmap, image, request, uncertainty=found.uncertainty)
        if found.uncertainty is not None:
            facts["uncertainty"] = mean_by_label(found.uncertainty, labelmap, present)
        watch.mark("write")
        score = mean_iou(one for slices in found.labels.values() for one in slices.values())
        return file, {
            "label_names": present,
            **facts,
            "score": None if score is None else round(score, 4),
            "objects": {name: _told(slices) for name, slices in found.labels.items() if slices},
            "missing": {
                name: f"{prompter.name} sees nothing of it; train that, or use a model that takes clicks"
                for name, slices in found.labels.items()
                if not slices
            },
            "prompts": prompter.name,
            "texts": {name: texts.description(name) for name in found.labels} if texts is not None else {},
            "model": {
                "name": "preference",
                "fingerprint": model.fingerprint,
                "round": model.training.get("round"),
            },
            "engine": self._base.name,
            "window": {"level": window.level, "width": window.width},
            "latencies": watch.total(),
        }

    def _prompter(self, model: TunedSam) -> Prompter:
        return self._prompters[model.training["prompts"]]()

    def _said(self, model: TunedSam) -> LabelTexts | None:
        """What embeds the texts that the model learned, if that is as it was then."""
        if model.network.extras is None:
            return None
        texts = self._texts()
        now = texts.record(self._labels)
        changed = [name for name, value in now.items() if model.texts.get(name) != value]
        if changed:
            raise InputError(
                "texts",
                changed[0],
                "is not what the model learned with; put it back in the project file, or train `preference` "
                "again",
                status=409,
            )
        return texts


def _told(slices: Mapping[int, PartsAnswer]) -> dict[str, Any]:
    """What became of a label, as JSON."""
    score = mean_iou(slices.values())
    return {
        "score": None if score is None else round(score, 4),
        "slices": sorted(slices),
        "prompts": {str(k): one.record() for k, one in slices.items()},
    }
