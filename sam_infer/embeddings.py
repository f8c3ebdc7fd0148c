"""Slices encoded once, and click histories decoded one click at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sam_infer.cache import ByteLru
from sam_infer.correct import correct_slice
from sam_infer.engines.base import Embedding, Engine
from sam_infer.geometry import slice_image
from sam_infer.intensity import Window
from sam_infer.propagate import mask_logits
from sam_infer.types import Candidates, FloatArray, Prompts
from sam_infer.volumes import Image

#: Clicks replayed one by one at most when none of their history is known.
REPLAY = 8


class SliceEncoder:
    """An engine behind a cache of slice embeddings and of decoded click histories.

    Cache keys hold the file's identity, the window, the slice and the engine's fingerprint, so a changed
    file, window or model never meets a stale entry. Nothing is kept per user: a history is known by its
    prompts, so two readers of one image cannot continue each other's object by accident.

    Args:
        engine: The engine.
        embedding_bytes: Limit of the embeddings in memory.
        history_bytes: Limit of the decoded histories in memory.
    """

    def __init__(
        self, *, engine: Engine, embedding_bytes: int = 512 << 20, history_bytes: int = 128 << 20
    ) -> None:
        self.engine = engine
        self._embeddings: ByteLru[Embedding] = ByteLru(limit=embedding_bytes, size_of=lambda e: e.nbytes)
        self._histories: ByteLru[Candidates] = ByteLru(
            limit=history_bytes, size_of=lambda c: c.logits.nbytes + c.iou.nbytes
        )

    def slice_values(self, image: Image, k: int, window: Window) -> FloatArray:
        """Slice ``k`` windowed to 0..1, (H, W) or (H, W, 3) float32."""
        return window.apply(slice_image(image.array, k))

    def _key(self, image: Image, k: int, window: Window) -> tuple[Hashable, ...]:
        return (image.key, k, window, self.engine.fingerprint)

    def embedding(self, image: Image, k: int, window: Window) -> tuple[Embedding, bool]:
        """The embedding of slice ``k``, and whether it was in the cache."""
        return self._embeddings.get_or_make(
            self._key(image, k, window), lambda: self.engine.encode(self.slice_values(image, k, window))
        )

    def decode(self, image: Image, k: int, window: Window, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode prompts on one slice as they are, in one call of the engine."""
        return self.engine.decode(self.embedding(image, k, window)[0], prompts)

    def decode_history(self, image: Image, k: int, window: Window, prompts: Prompts) -> Candidates:
        """Decode clicks as corrections of one another: each sees the logits that the one before it gave.

        What a click changes is checked by `sam_infer.correct.correct_slice`.

        The state before the last click is taken from the cache where it is there (then only the last click is
        decoded, and an undone click costs nothing); otherwise up to `REPLAY` clicks are replayed, foreground
        first.

        Args:
            image: The image.
            k: Slice index.
            window: The window.
            prompts: All clicks so far, the box, and in ``mask_logits`` the mask that is being corrected.
        """
        base = self._key(image, k, window)
        if prompts.mask_logits is not None:
            base = (*base, hashlib.sha256(prompts.mask_logits.tobytes()).hexdigest())
        return self._state(base, self.embedding(image, k, window)[0], prompts, REPLAY)

    def _state(
        self, base: tuple[Hashable, ...], embedding: Embedding, prompts: Prompts, replay: int
    ) -> Candidates:
        key = _state_key(base, prompts)
        known = self._histories.get(key)
        if known is not None:
            return known
        before = self._before(base, embedding, prompts, replay)
        if before is not None:
            prompts = replace(prompts, mask_logits=before.logits)
        decoded = self.engine.decode(embedding, [prompts])[0]
        logits = decoded.logits[decoded.best]
        if before is not None:
            logits = correct_slice(before.logits, logits, point=before.point, label=before.label)
        best = Candidates(logits=logits[None], iou=decoded.iou[decoded.best][None])
        self._histories.put(key, best)
        return best

    def _before(
        self, base: tuple[Hashable, ...], embedding: Embedding, prompts: Prompts, replay: int
    ) -> _Before | None:
        """What there was before the last click; None where that was nothing, or is too long ago to replay."""
        found = [_without_last(prompts, label) for label in (0, 1)]
        options = [option for option in found if option is not None]
        for parent, point, label in options:
            if not len(parent.points) and parent.box is None and parent.mask_logits is not None:
                return _Before(logits=parent.mask_logits, point=point, label=label)
            known = self._histories.get(_state_key(base, parent))
            if known is not None:
                break
        else:
            if not options or not replay:
                return None
            parent, point, label = options[0]
            known = self._state(base, embedding, parent, replay - 1)
        logits = known.logits[0]
        if prompts.mask_logits is not None:  # a mask that is being corrected stays as sure as it was sent
            logits = mask_logits(logits > 0)
        return _Before(logits=logits, point=point, label=label)


@dataclass(frozen=True, kw_only=True)
class _Before:
    logits: FloatArray
    point: tuple[int, int]
    label: int


def _state_key(base: tuple[Hashable, ...], prompts: Prompts) -> Hashable:
    return (*base, prompts.box, prompts.positive.tobytes(), prompts.negative.tobytes())


def _without_last(prompts: Prompts, label: int) -> tuple[Prompts, tuple[int, int], int] | None:
    """The prompts before their last click of this label, that click, its label; None where none is left."""
    indices = np.flatnonzero(prompts.point_labels == label)
    if not len(indices):
        return None
    last = indices[-1]
    parent = replace(
        prompts, points=np.delete(prompts.points, last, 0), point_labels=np.delete(prompts.point_labels, last)
    )
    x, y = prompts.points[last]
    return None if parent.is_empty else (parent, (int(x), int(y)), label)
