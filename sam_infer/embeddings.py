"""Slices encoded once, and click histories decoded one click at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from sam_infer.cache import ByteLru
from sam_infer.engines.base import Embedding, Engine
from sam_infer.geometry import slice_image
from sam_infer.intensity import Window
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
        previous = None
        parents = [p for p in (_without_last(prompts, 0), _without_last(prompts, 1)) if p is not None]
        for parent in parents:
            previous = self._histories.get(_state_key(base, parent))
            if previous is not None:
                break
        if previous is None and parents and replay > 0:
            previous = self._state(base, embedding, parents[0], replay - 1)
        if previous is not None:
            prompts = Prompts(
                points=prompts.points,
                point_labels=prompts.point_labels,
                box=prompts.box,
                mask_logits=previous.logits[previous.best],
            )
        decoded = self.engine.decode(embedding, [prompts])[0]
        best = Candidates(logits=decoded.logits[decoded.best][None], iou=decoded.iou[decoded.best][None])
        self._histories.put(key, best)
        return best


def _state_key(base: tuple[Hashable, ...], prompts: Prompts) -> Hashable:
    return (*base, prompts.box, prompts.positive.tobytes(), prompts.negative.tobytes())


def _without_last(prompts: Prompts, label: int) -> Prompts | None:
    """The prompts before their last click of this label; None where nothing would be left to decode."""
    indices = np.flatnonzero(prompts.point_labels == label)
    if not len(indices):
        return None
    keep = np.ones(len(prompts.points), bool)
    keep[indices[-1]] = False
    parent = Prompts(
        points=prompts.points[keep],
        point_labels=prompts.point_labels[keep],
        box=prompts.box,
        mask_logits=prompts.mask_logits,
    )
    only_the_mask = not len(parent.points) and parent.box is None
    return None if parent.is_empty or only_the_mask else parent
