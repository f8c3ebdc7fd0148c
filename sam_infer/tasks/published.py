"""Tasks that run what was last published: a model in a file that training replaces now and then."""

from __future__ import annotations

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from sam_infer.errors import InputError
from sam_infer.networks.modelfile import Published
from sam_infer.tasks.reply import LabelmapTask

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Published)


class PublishedModel(Generic[Model]):
    """The model of a file, loaded anew whenever the file changes. Safe to call from several threads.

    Args:
        path: The weights file that the training loop publishes.
        load: Reads it; OSError and ValueError mean that it cannot be used.
        labels: The project's labels, name to value; a model of others is not used.
        train: How to train a model, such as "POST /train/unet".
        minimum: Accepted cases that a first training needs.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        load: Callable[[Path], Model],
        labels: Mapping[str, int],
        train: str,
        minimum: int,
    ) -> None:
        self.path = Path(path)
        self._read = load
        self._labels = dict(labels)
        self._train = train
        self._minimum = minimum
        self._model: Model | None = None
        self._seen: tuple[int, int, int] | None = None
        self._failure = ""
        self._lock = threading.Lock()

    def current(self) -> tuple[Model | None, str]:
        """The model and "", or None and what to do; loads where the file changed since the last look."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None, (
                f"not trained yet: accept at least {self._minimum} cases and start training ({self._train})"
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
            model = self._read(self.path)
        except (OSError, ValueError) as error:
            logger.error("%s", error)
            self._failure = f"its weights cannot be used ({error})"
            return
        if dict(model.labels) != self._labels:
            self._failure = (
                f"the trained model has labels {dict(model.labels)}, the project has {self._labels}: "
                f"start training ({self._train}) to replace it"
            )
            return
        self._model = model


class PublishedTask(LabelmapTask, Generic[Model]):
    """A task that runs a published model.

    Until one for the project's labels is published the task is listed without labels, so that 3D Slicer does
    not run it on each next sample, and a request is answered with 409.
    """

    @abstractmethod
    def current(self) -> tuple[Model | None, str]:
        """The model and "", or None and why there is none and what to do."""

    def is_valid(self) -> bool:
        """Always: a task without a model is listed too, without labels."""
        return True

    def info(self) -> dict[str, Any]:
        """As stock; without labels while there is nothing to run."""
        model, reason = self.current()
        found = super().info()
        if model is None:
            return {**found, "labels": [], "description": f"{self.description}: {reason}"}
        figures = model.training
        return {
            **found,
            "description": f"{self.description} (round {figures.get('round', '?')}, "
            f"trained on {figures.get('training_cases', '?')} cases)",
        }

    def published(self, name: str) -> Model:
        """The model.

        Args:
            name: What the model is called, for the error.

        Raises:
            InputError: (409) While there is none for the project's labels.
        """
        model, reason = self.current()
        if model is None:
            raise InputError("model", name, reason, status=409)
        return model
