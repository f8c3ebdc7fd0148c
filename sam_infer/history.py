"""Click histories: each click corrects what the clicks before it gave, and none is decoded twice."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import numpy as np

from sam_infer.cache import ByteLru
from sam_infer.correct import correct_slice
from sam_infer.step import mask_logits
from sam_infer.types import Candidates, FloatArray, Prompts

#: Clicks replayed one by one at most when none of their history is known.
REPLAY = 8
#: Decodes prompts, and is told what the clicks before the last one gave; None where there were none.
Decode = Callable[[Prompts, Candidates | None], Candidates]


class ClickHistories:
    """Decoded clicks, by what they were decoded from.

    A history is known by its prompts and by what they lie on, never by who sent them: two readers of one
    image cannot continue each other's object by accident, and a click that is taken back costs nothing.

    Args:
        limit: Bytes kept at most.
    """

    def __init__(self, *, limit: int) -> None:
        self._known: ByteLru[Candidates] = ByteLru(
            limit=limit, size_of=lambda c: c.logits.nbytes + c.iou.nbytes
        )

    def knows(self, base: tuple[Hashable, ...], prompts: Prompts) -> bool:
        """Whether `answer` has nothing to decode."""
        return self._known.get(_state_key(base, prompts)) is not None

    def answer(self, base: tuple[Hashable, ...], prompts: Prompts, decode: Decode) -> Candidates:
        """The one candidate after all clicks.

        What is known is not decoded again: the whole, or all but the last click; otherwise up to `REPLAY`
        clicks are replayed, foreground first. What a click changes is checked by
        `sam_infer.correct.correct_slice`.

        Args:
            base: Names all that the answer depends on beside clicks and box: image, slice, window, engine,
                zoom, and the mask in ``prompts.mask_logits``.
            prompts: All clicks so far, the box, and the mask that is being corrected.
            decode: The engine.
        """
        return self._state(base, prompts, decode, REPLAY)

    def _state(self, base: tuple[Hashable, ...], prompts: Prompts, decode: Decode, replay: int) -> Candidates:
        key = _state_key(base, prompts)
        known = self._known.get(key)
        if known is not None:
            return known
        before = self._before(base, prompts, decode, replay)
        if before is not None:
            prompts = replace(prompts, mask_logits=before.logits)
        decoded = decode(prompts, None if before is None else before.state)
        logits = decoded.logits[decoded.best]
        if before is not None:
            logits = correct_slice(before.logits, logits, point=before.point, label=before.label)
        # A view would keep the other candidates in memory with it.
        best = Candidates(logits=logits[None].copy(), iou=decoded.iou[[decoded.best]], crop=decoded.crop)
        self._known.put(key, best)
        return best

    def _before(
        self, base: tuple[Hashable, ...], prompts: Prompts, decode: Decode, replay: int
    ) -> _Before | None:
        """What there was before the last click; None where that was nothing, or is too long ago to replay."""
        found = [_without_last(prompts, label) for label in (0, 1)]
        options = [option for option in found if option is not None]
        for parent, point, label in options:
            if not len(parent.points) and parent.box is None and parent.mask_logits is not None:
                return _Before(state=None, logits=parent.mask_logits, point=point, label=label)
            known = self._known.get(_state_key(base, parent))
            if known is not None:
                break
        else:
            if not options or not replay:
                return None
            parent, point, label = options[0]
            known = self._state(base, parent, decode, replay - 1)
        logits = known.logits[0]
        if prompts.mask_logits is not None:  # a mask that is being corrected stays as sure as it was sent
            logits = mask_logits(logits > 0)
        return _Before(state=known, logits=logits, point=point, label=label)


@dataclass(frozen=True, kw_only=True)
class _Before:
    state: Candidates | None
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
