"""Tasks that run what was last published."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

from sam_infer.errors import InputError
from sam_infer.networks.modelfile import Published
from sam_infer.tasks.reply import LabelmapTask

Model = TypeVar("Model", bound=Published)


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
