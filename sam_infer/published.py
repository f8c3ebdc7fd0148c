"""What was last published: a model in a file that training replaces now and then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from sam_infer.errors import InputError

logger = logging.getLogger(__name__)


class Labelled(Protocol):
    """What a published model must say of itself."""

    @property
    def labels(self) -> Mapping[str, int]:
        """Label name to its value in label maps."""


Model = TypeVar("Model", bound=Labelled)


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

    def required(self, name: str) -> Model:
        """The model, as `current` finds it.

        Args:
            name: What it is called, for the error.

        Raises:
            InputError: (409) Where there is none, with what to do.
        """
        model, reason = self.current()
        if model is None:
            raise InputError("model", name, reason, status=409)
        return model

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
