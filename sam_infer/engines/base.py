"""The interface every promptable engine has: encode a slice once, decode prompts many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What an engine keeps of one slice image.

    Args:
        image_size: (H, W) of the encoded slice in pixels.
        features: The engine's own tensors by name, on the engine's device.
    """

    image_size: tuple[int, int]
    features: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of the features in bytes."""
        return sum(t.element_size() * t.nelement() for t in self.features.values())


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How an engine's `encode` sees a slice, and what that costs.

    Args:
        side: Longest side, in pixels, to which a slice is resampled before it is encoded.
        cheap: True where encoding takes no longer than people wait for a click, some 0.3 s.
        device: Torch device of the features.
        margin: Side of a crop around an object over the object's longest side, at least.
        fingerprint: Changes whenever what `encode` gives changes; part of the key of every kept embedding.
            None = the engine's own, as where nothing changes without the encoder.
    """

    side: int
    cheap: bool
    device: str
    margin: float = 3.0
    fingerprint: str | None = None


@runtime_checkable
class Engine(Protocol):
    """Turns a slice image and prompts into masks. Implementations are safe to call from threads."""

    @property
    def name(self) -> str:
        """The registry's name of the engine."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the weights or the preprocessing change; part of the key of every kept answer."""

    @property
    def encoding(self) -> Encoding | None:
        """What `encode` does.

        None where an embedding is little more than the slice itself and `decode` reads its pixels at full
        resolution: then there is nothing to keep on disk, to encode ahead, or to gain from a crop.
        """

    def encode(self, image: FloatArray) -> Embedding:
        """Encode one slice.

        Args:
            image: (H, W) or (H, W, 3) float32 in 0..1, already windowed (`sam_infer.intensity`).
        """

    def decode(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode every prompt against one embedding, in one batch where the engine can.

        Args:
            embedding: From `encode` of this engine.
            prompts: One entry per object; none may be empty (`Prompts.is_empty`).

        Returns:
            One `Candidates` per prompt, in order, at the slice's own resolution.
        """


@runtime_checkable
class VideoEngine(Engine, Protocol):
    """An engine that follows an object through a volume by its own memory of it, as through a video."""

    def track(
        self,
        path: range,
        *,
        seeds: Mapping[int, BoolArray],
        embedding: Callable[[int], Embedding],
        clicks: Callable[[int], Prompts],
        length: int,
    ) -> Iterator[tuple[int, Candidates]]:
        """Follow an object along a path, slice by slice; a slice is looked at only when it is asked for.

        Args:
            path: Slices in the order in which they are visited, step 1 or -1; none of them a seed.
            seeds: (H, W) bool masks of the object on the slices where it is known, by k; those nearest to the
                path's start count where there are more than the engine remembers.
            embedding: Gives a slice's embedding, from `encode` of this engine or from a cache of it.
            clicks: The user's points on a slice of the path, which correct what memory says there.
            length: Number of slices of the volume.

        Yields:
            k and one candidate on it; its mask is empty where the engine sees no object.
        """
