"""A published model that stands on a SAM, behind caches of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine


class OnSam(Protocol):
    """What a SAM learned, with or without anything beside it."""

    @property
    def labels(self) -> Mapping[str, int]:
        """Label name to its value in label maps."""

    def engine(self, base: SamEngine) -> SamEngine:
        """The engine that answers with it."""


Model = TypeVar("Model", bound=OnSam)


@dataclass(frozen=True, kw_only=True)
class ServedSam(Generic[Model]):
    """A published model, ready to answer.

    Args:
        model: The model.
        encoder: Its engine behind caches.
    """

    model: Model
    encoder: SliceEncoder

    @property
    def labels(self) -> Mapping[str, int]:
        """Label name to its value in label maps."""
        return self.model.labels

    @classmethod
    def of(
        cls, model: Model, base: SamEngine, *, store: EmbeddingStore | None, embedding_bytes: int
    ) -> ServedSam[Model]:
        """A model and its engine.

        Args:
            model: The model.
            base: The SAM that was tuned.
            store: The base's embeddings on disk, used where its encoder stood still; None = there are none.
            embedding_bytes: Limit of the embeddings in memory.
        """
        engine = model.engine(base)
        same = engine.encoding.fingerprint == base.fingerprint
        encoder = SliceEncoder(
            engine=engine, store=store if same else None, embedding_bytes=embedding_bytes, history_bytes=0
        )
        return cls(model=model, encoder=encoder)
