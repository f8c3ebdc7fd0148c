"""When an object is taken to have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sam_infer.types import BoolArray, FloatArray

_BINS = 32


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When an object is taken to have ended. This project's own choice.

    Args:
        min_pixels: A smaller mask ends the object.
        min_overlap: Share of the smaller of two neighbouring masks that the two must share.
        max_growth: A mask this many times larger than its neighbour is a leak.
        min_iou: A lower predicted IoU ends the object.
        min_likeness: Bhattacharyya coefficient, 0 to 1, that the intensities inside must keep with those
            inside the prompted slice's mask.
        slope: How far the outline may move outwards from slice to slice, in slice distances.
        neck: Where the area has fallen below this share of its largest and then grows by half again, the
            object is taken to have ended at the neck and what follows to be a neighbour.
    """

    min_pixels: int = 6
    min_overlap: float = 0.5
    max_growth: float = 2.0
    min_iou: float = 0.35
    min_likeness: float = 0.8
    slope: float = 1.5
    neck: float = 0.5

    def reach(self, distance: float) -> float:
        """Pixels by which a mask may stick out of its neighbour's, ``distance`` pixels away."""
        return max(2.0, self.slope * distance)

    def ended(
        self,
        mask: BoolArray,
        neighbour: BoolArray,
        *,
        iou: float,
        values: FloatArray,
        reference: FloatArray,
    ) -> str:
        """Why the object is taken to have ended on a slice; "" where it goes on.

        Args:
            mask: (h, w) bool, the mask found there.
            neighbour: (h, w) bool, the mask of the slice before it.
            iou: Predicted IoU of ``mask``.
            values: (h, w) or (h, w, 3) windowed slice values, 0 to 1.
            reference: `histogram` inside the prompted slice's mask.
        """
        area, before = np.count_nonzero(mask), np.count_nonzero(neighbour)
        if area < self.min_pixels:
            return "vanished"
        if iou < self.min_iou:
            return "uncertain"
        if area > self.max_growth * max(before, 4 * self.min_pixels):
            return "grew"
        if np.count_nonzero(mask & neighbour) < self.min_overlap * min(area, before):
            return "no overlap"
        likeness = float(np.sqrt(reference * histogram(values, mask)).sum())
        return "other intensities" if likeness < self.min_likeness else ""

    def narrowest(self, areas: Sequence[int]) -> int | None:
        """Position of the neck where areas have narrowed and grow again; None where they do not."""
        narrowest = int(np.argmin(areas))
        if areas[narrowest] > self.neck * max(areas[: narrowest + 1]):
            return None
        return narrowest if areas[-1] > 1.5 * areas[narrowest] else None


def histogram(values: FloatArray, mask: BoolArray) -> FloatArray:
    """Smoothed, normalised histogram of the windowed grey values inside a mask, (32,) float32."""
    inside = values[mask]
    grey = inside.mean(axis=-1) if inside.ndim == 2 else inside
    counts = np.bincount(np.clip(grey * _BINS, 0, _BINS - 1).astype(int), minlength=_BINS)
    smooth = ndimage.gaussian_filter1d(counts.astype(np.float32), 1.0, mode="nearest")
    return np.asarray(smooth / max(float(smooth.sum()), 1e-6))
