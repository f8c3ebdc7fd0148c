"""`sam_tuned`: clicks and boxes on a slice, answered by the SAM that learned from the accepted cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.tuned import TunedEngine
from sam_infer.library import ImageLibrary
from sam_infer.tasks.click import ClickInfer
from sam_infer.tasks.published import PublishedTask
from sam_infer.tasks.reply import LabelmapFile
from sam_infer.tuning.tunedfile import TunedSam


class TunedClickInfer(ClickInfer, PublishedTask[TunedSam]):
    """As `sam_infer.tasks.click.ClickInfer` in 2D, for projects whose own engine is no SAM and cannot learn.

    Args:
        encoder: The tuned engine behind its caches.
        engine: The same engine.
        library: Reads images.
    """

    def __init__(self, *, encoder: SliceEncoder, engine: TunedEngine, library: ImageLibrary) -> None:
        super().__init__(encoder=encoder, library=library, dimension=2)
        self._engine = engine

    def current(self) -> tuple[TunedSam | None, str]:
        """The published model and "", or None and what to do."""
        return self._engine.current()

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Answer one click request.

        Raises:
            InputError: (409) While nothing is published for the project's labels; else as `ClickInfer`.
        """
        self.published("sam_tuned")
        return super().answer(request)
