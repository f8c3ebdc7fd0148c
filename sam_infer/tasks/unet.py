"""Automatic segmentation with the model that learned from accepted masks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.networks.unet import UnetModel, load_unet
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.reply import LabelmapFile, LabelmapTask, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.volumes import Image

logger = logging.getLogger(__name__)


class UnetInfer(LabelmapTask):
    """Labels a whole image with the published U-Net; picks up newly published weights by itself.

    Until a model for the project's labels is published the task is listed without labels, so that 3D Slicer
    does not run it on each next sample, and a request is answered with 409.

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
        self._device = device
        self._minimum = minimum
        self._model: UnetModel | None = None
        self._seen: tuple[int, int, int] | None = None
        self._failure = ""
        self._lock = threading.Lock()

    def is_valid(self) -> bool:
        """Always: an untrained model is listed too, without labels."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The weights file; None where it is asked to exist and does not."""
        return str(self.path) if self.path.is_file() or not validate else None

    def info(self) -> dict[str, Any]:
        """As stock; without labels while there is nothing to run."""
        model, reason = self._current()
        found = super().info()
        if model is None:
            return {**found, "labels": [], "description": f"{self.description}: {reason}"}
        figures = model.training
        return {
            **found,
            "description": f"{self.description} (round {figures.get('round', '?')}, "
            f"trained on {figures.get('training_cases', '?')} cases)",
        }

    def model(self) -> UnetModel | None:
        """The published model; None while there is none for the project's labels."""
        return self._current()[0]

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Args:
            request: ``image`` = path of a file; ``window_level`` and ``window_width``; the keys of
                `sam_infer.tasks.numbering.numbered` and `sam_infer.tasks.reply.make_reply`.

        Returns:
            The label map, and: label_names (name to value, the classes present), score (confidence
            0..1), model, latencies in seconds, window in image units.

        Raises:
            InputError: (409) While no model is published for the project's labels.
        """
        watch = Stopwatch()
        model, reason = self._current()
        if model is None:
            raise InputError("model", "unet", reason, status=409)
        watch.mark("model")
        image = self._read(Path(request["image"]))
        window = self._window_for(image, request)
        watch.mark("load")
        prediction = model.predict_volume(image, window)
        watch.mark("predict")
        labelmap, names = numbered(prediction.labelmap, model.labels, request)
        file, facts = make_reply(labelmap, image, request)
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

    def _current(self) -> tuple[UnetModel | None, str]:
        """The model and "", or None and what to do; loads where the file changed since the last look."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None, (
                f"not trained yet: accept at least {self._minimum} cases and start training "
                "(POST /train/unet)"
            )
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        with self._lock:
            if seen != self._seen:
                self._load()
                self._seen = seen
            return self._model, self._failure

    def _load(self) -> None:
        """Swap the model; requests in flight keep theirs."""
        self._model, self._failure = None, ""
        try:
            model = load_unet(self.path, device=self._device)
        except (OSError, ValueError) as error:
            logger.error("%s", error)
            self._failure = f"its weights cannot be used ({error})"
            return
        if dict(model.labels) != dict(self.labels):
            self._failure = (
                f"the trained model has labels {dict(model.labels)}, the project has {dict(self.labels)}: "
                "start training (POST /train/unet) to replace it"
            )
            return
        self._model = model
