"""One slice of a propagated object, kept within a window around its mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_infer.geometry import tight_box
from sam_infer.types import BoolArray, Box, Candidates, FloatArray

#: Rows and columns of a slice.
Window = tuple[slice, slice]
_NOTHING: Window = (slice(0, 0), slice(0, 0))
#: Largest strength of the logits that are kept and averaged.
CLIPPED = 8.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """The object on one slice.

    Args:
        k: Slice index.
        window: The part of the slice that ``mask`` and ``logits`` cover; empty where there is no object.
        mask: (h, w) bool, no view of a whole slice, which would stay in memory with it.
        logits: (h, w) float16, within `CLIPPED`; may be positive beyond the mask.
        iou: Predicted IoU, 0 to 1.
    """

    k: int
    window: Window
    mask: BoolArray
    logits: NDArray[np.float16]
    iou: float

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.mask))

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.mask.nbytes + self.logits.nbytes

    @property
    def box(self) -> Box | None:
        """(x0, y0, x1, y1) of the mask in slice pixels, None where it is empty."""
        box = tight_box(self.mask)
        if box is None:
            return None
        x, y = self.window[1].start, self.window[0].start
        return (box[0] + x, box[1] + y, box[2] + x, box[3] + y)

    def mask_on(self, window: Window) -> BoolArray:
        """(h, w) bool: the mask on another window."""
        return _moved(self.mask, self.window, window, False)

    def logits_on(self, window: Window) -> NDArray[np.float16]:
        """(h, w) float16: the logits on another window, negative wherever the mask is not."""
        held = np.where(self.mask, self.logits, np.minimum(self.logits, np.float16(-1.0)))
        return _moved(held, self.window, window, np.float16(-CLIPPED))


def decoded_step(k: int, found: Candidates) -> Step:
    """The best candidate of slice ``k`` as a step."""
    logits = found.logits[found.best]
    mask = logits > 0
    window = window_around(tight_box(mask), 2.0, mask.shape)
    return Step(
        k=k,
        window=window,
        mask=mask[window].copy(),
        logits=clipped(logits[window]),
        iou=float(found.iou[found.best]),
    )


def mask_step(k: int, mask: BoolArray, *, iou: float) -> Step:
    """An (H, W) bool mask of slice ``k`` as a step, as sure everywhere."""
    window = window_around(tight_box(mask), 2.0, mask.shape)
    held = mask[window].copy()
    return Step(k=k, window=window, mask=held, logits=clipped(mask_logits(held)), iou=iou)


def mask_logits(mask: BoolArray, value: float = 6.0) -> FloatArray:
    """(H, W) logits of a binary mask: plus ``value`` inside, minus outside."""
    return np.where(mask, np.float32(value), np.float32(-value)).astype(np.float32)


def clipped(logits: NDArray) -> NDArray[np.float16]:
    """Logits within `CLIPPED`, float16."""
    return np.clip(logits, -CLIPPED, CLIPPED).astype(np.float16)


def window_around(box: Box | None, margin: float, size: tuple[int, ...]) -> Window:
    """The window of a box with a margin in pixels on a slice of ``size`` (H, W)."""
    if box is None:
        return _NOTHING
    wide = int(np.ceil(margin))
    x0, y0, x1, y1 = (int(v) for v in box)
    return (
        slice(max(0, y0 - wide), min(size[0], y1 + wide + 1)),
        slice(max(0, x0 - wide), min(size[1], x1 + wide + 1)),
    )


def overlap(a: Step, b: Step) -> float:
    """Intersection over union of two steps' masks, 1 where both are empty."""
    window = _union(a.window, b.window)
    x, y = a.mask_on(window), b.mask_on(window)
    union = np.count_nonzero(x | y)
    return float(np.count_nonzero(x & y) / union) if union else 1.0


def blend(a: Step, b: Step, share: float, k: int) -> Step:
    """The step on slice ``k`` whose logits are the mean of two steps', ``b`` weighing ``share``, 0 to 1."""
    window = _union(a.window, b.window)
    x, y = (step.logits_on(window).astype(np.float32) for step in (a, b))
    logits = (1.0 - share) * x + share * y
    iou = (1.0 - share) * a.iou + share * b.iou
    return Step(k=k, window=window, mask=logits > 0, logits=clipped(logits), iou=iou)


def _union(a: Window, b: Window) -> Window:
    if a == _NOTHING or b == _NOTHING:
        return b if a == _NOTHING else a
    rows, columns = (slice(min(p.start, q.start), max(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return rows, columns


def _moved(array: NDArray, window: Window, target: Window, outside: object) -> NDArray:
    """An array of one window on another, ``outside`` where the first does not reach."""
    out = np.full([part.stop - part.start for part in target], outside, array.dtype)
    shared = [
        (max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(window, target, strict=True)
    ]  # fmt: skip
    if all(low < high for low, high in shared):
        to, of = (
            tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(shared, w, strict=True))
            for w in (target, window)
        )
        out[to] = array[of]
    return out
