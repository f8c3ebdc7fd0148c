"""A SAM that learns: its base until something is published, then that, from the next request on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sam_infer.engines.base import Embedding, Encoding
from sam_infer.engines.sam import SamEngine
from sam_infer.published import PublishedModel
from sam_infer.tuning.tunedfile import TunedSam, load_tuned
from sam_infer.types import Candidates, FloatArray, Prompts


@dataclass(frozen=True, kw_only=True)
class _Served:
    """A published model, ready to answer."""

    model: TunedSam
    engine: SamEngine

    @property
    def labels(self) -> Mapping[str, int]:
        return self.model.labels


class TunedEngine:
    """An engine whose weights a trainer replaces while it is served. Safe to call from several threads.

    Where the base's encoder stood still in training, embeddings are the base's own: they are kept, on disk
    too, when a new decoder is published.

    Args:
        base: The SAM that is tuned.
        path: The file that the training loop publishes.
        labels: The project's labels, name to value; a model of others is not used.
    """

    def __init__(self, *, base: SamEngine, path: Path, labels: Mapping[str, int]) -> None:
        self.base = base
        self.path = path
        self._published = PublishedModel(
            path, load=self._load, labels=labels, train="POST /train/sam_finetune", minimum=4
        )

    def _load(self, path: Path) -> _Served:
        model = load_tuned(path, self.base)
        return _Served(model=model, engine=model.engine(self.base))

    def current(self) -> tuple[TunedSam | None, str]:
        """The published model and "", or None and why it is the base that answers."""
        served, reason = self._published.current()
        return (None, reason) if served is None else (served.model, "")

    @property
    def name(self) -> str:
        """Registry name of the base."""
        return self.base.name

    @property
    def fingerprint(self) -> str:
        """The base's, and that of the published file where there is one."""
        model, _ = self.current()
        return self.base.fingerprint if model is None else f"{self.base.fingerprint}-{model.fingerprint}"

    @property
    def encoding(self) -> Encoding:
        """The base's, with the fingerprint of whose encoder it is."""
        encoder = self._encoder
        made_by = self.base.fingerprint if encoder is self.base else self.fingerprint
        return replace(self.base.encoding, fingerprint=made_by)

    def encode(self, image: FloatArray) -> Embedding:
        """Encode one slice; see `sam_infer.engines.base.Engine.encode`."""
        return self._encoder.encode(image)

    def encode_batch(self, images: Sequence[FloatArray]) -> list[Embedding]:
        """Encode slices; see `sam_infer.engines.sam.SamEngine.encode_batch`."""
        return self._encoder.encode_batch(images)

    def decode(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode prompts; see `sam_infer.engines.base.Engine.decode`."""
        served, _ = self._published.current()
        return (self.base if served is None else served.engine).decode(embedding, prompts)

    @property
    def _encoder(self) -> SamEngine:
        served, _ = self._published.current()
        if served is None or served.model.network.tuning.encoder == "frozen":
            return self.base
        return served.engine
