"""Automatic segmentation with the model that learned from accepted masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam_infer.intensity import Window
from sam_infer.networks.unet import UnetModel, load_unet
from sam_infer.prompts.request import parse_flag
from sam_infer.published import PublishedModel
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.published import PublishedTask
from sam_infer.tasks.reply import LabelmapFile, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.uncertainty import mean_by_label
from sam_infer.volumes import Image


class UnetInfer(PublishedTask[UnetModel]):
    """Labels a whole image with the published U-Net; picks up newly published weights by itself.

    Args:
        path: The weights file that the training loop publishes.
        labels: The project's labels, name to value.
        window_for: The window of an image for a request.
        read: Path to image; a cached reader.
        device: Where the network runs.
        minimum: Accepted cases that a first training needs, for the description.
    """

    def __init__(
        self,
        *,
        path: Path | str,
        labels: Mapping[str, int],
        window_for: Callable[[Image, Mapping[str, Any]], Window],
        read: Callable[[Path], Image],
        device: str = "cpu",
        minimum: int = 4,
    ) -> None:
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description="U-Net that learns from accepted masks",
        )
        self.path = Path(path)
        self._window_for = window_for
        self._read = read
        self._published = PublishedModel(
            path,
            load=lambda file: load_unet(file, device=device),
            labels=labels,
            train="POST /train/unet",
            minimum=minimum,
        )

    def get_path(self, validate: bool = True) -> str | None:
        """The weights file; None where it is asked to exist and does not."""
        return str(self.path) if self.path.is_file() or not validate else None

    def current(self) -> tuple[UnetModel | None, str]:
        """The published model and "", or None and what to do."""
        return self._published.current()

    def fingerprint(self) -> str:
        """Of the published model.

        Raises:
            InputError: (409) While no model is published for the project's labels.
        """
        return self.published("unet").fingerprint

    def model(self) -> UnetModel | None:
        """The published model; None while there is none for the project's labels."""
        return self.current()[0]

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Args:
            request: ``image`` = path of a file; ``window_level`` and ``window_width``;
                ``output_uncertainty`` (true = with a map of the classes' entropy); the keys of
                `sam_infer.tasks.numbering.numbered` and `sam_infer.tasks.reply.make_reply`.

        Returns:
            The label map, and: label_names (name to value, the classes present), score (confidence
            0..1), model, latencies in seconds, window in image units; uncertainty (mean of each class
            present, 0..1) where it was asked for.

        Raises:
            InputError: (409) While no model is published for the project's labels.
        """
        watch = Stopwatch()
        model = self.published("unet")
        uncertain = parse_flag("output_uncertainty", request.get("output_uncertainty"))
        watch.mark("model")
        image = self._read(Path(request["image"]))
        window = self._window_for(image, request)
        watch.mark("load")
        prediction = model.predict_volume(image, window, entropy=uncertain)
        watch.mark("predict")
        labelmap, names = numbered(prediction.labelmap, model.labels, request)
        file, facts = make_reply(labelmap, image, request, uncertainty=prediction.entropy)
        if prediction.entropy is not None:
            facts["uncertainty"] = mean_by_label(prediction.entropy, labelmap, names)
        watch.mark("write")
        return file, {
            "label_names": names,
            **facts,
            "score": round(prediction.confidence, 4),
            "model": {
                "name": "unet",
                "fingerprint": model.fingerprint,
                "round": model.training.get("round"),
            },
            "window": {"level": window.level, "width": window.width},
            "latencies": watch.total(),
        }
