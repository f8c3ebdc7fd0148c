"""Answers in 3D that a further click continues, known by their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from sam_infer.cache import ByteLru
from sam_infer.prompts.request import Clicks
from sam_infer.propagate import Volume
from sam_infer.types import BoolArray, Crop

#: Bytes that an answer takes up beside its slices, at most: so many empty ones have an end, too.
ENTRY = 32 << 10


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request in 3D was answered with.

    Args:
        volume: The object.
        own: Slices that were prompted when nothing was known of them.
        prompted: All slices that the object was followed from.
        crop: The part of the prompted slices that was encoded by itself; None = whole slices.
    """

    volume: Volume
    own: frozenset[int]
    prompted: frozenset[int]
    crop: Crop | None = None

    @property
    def nbytes(self) -> int:
        """Memory in bytes, with that of the key it is found by."""
        return ENTRY + self.volume.nbytes


class VolumeHistory:
    """Keeps answers in memory, nothing per user: one is found by the prompts that led to it.

    Args:
        limit: Bytes kept at most.
    """

    def __init__(self, *, limit: int = 128 << 20) -> None:
        self._answers: ByteLru[Answer] = ByteLru(limit=limit, size_of=lambda answer: answer.nbytes)

    def get(self, base: Hashable, clicks: Clicks) -> Answer | None:
        """The answer to these very prompts."""
        return self._answers.get(_key(base, clicks.foreground, clicks.background))

    def before(self, base: Hashable, clicks: Clicks) -> tuple[Answer, int] | None:
        """The answer before the last click, and the slice of that click; None where it is not known.

        Args:
            base: All that the answer depends on beside the clicks: image, window, engine, boxes, bounds.
            clicks: All clicks so far.
        """
        foreground, background = clicks.foreground, clicks.background
        if len(background):
            known = self._answers.get(_key(base, foreground, background[:-1]))
            if known is not None:
                return known, int(background[-1, 2])
        if len(foreground):
            known = self._answers.get(_key(base, foreground[:-1], background))
            if known is not None:
                return known, int(foreground[-1, 2])
        return None

    def put(self, base: Hashable, clicks: Clicks, answer: Answer) -> None:
        """Keep an answer."""
        self._answers.put(_key(base, clicks.foreground, clicks.background), answer)


def mask_key(mask: BoolArray) -> str:
    """SHA-256 of an (I, J, K) mask, which tells it from others of its shape and order in memory."""
    return hashlib.sha256(np.packbits(mask.ravel(order="K")).data).hexdigest()


def _key(base: Hashable, foreground: np.ndarray, background: np.ndarray) -> Hashable:
    return (base, foreground.tobytes(), background.tobytes())
