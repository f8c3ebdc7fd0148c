"""Prompts, candidate masks and array types shared by engines, propagation and tasks.

Slice pixel coordinates: x is the column, y is the row, pixel centres lie at integers, the origin is the
first pixel. A slice image has shape (H, W): ``image[y, x]``. Everything voxel-based (i, j, k) is
converted in `sam_infer.geometry` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Box = tuple[float, float, float, float]
#: (x0, y0, x1, y1): a rectangle of whole pixels of a slice, the outermost included.
Crop = tuple[int, int, int, int]


def _no_points() -> FloatArray:
    return np.zeros((0, 2), np.float32)


def _no_labels() -> NDArray[np.int64]:
    return np.zeros((0,), np.int64)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What one object on one slice is prompted with.

    Args:
        points: (N, 2) float32, xy in slice pixels.
        point_labels: (N,) int64, 1 = foreground, 0 = background.
        box: (x0, y0, x1, y1) in slice pixels, x0 <= x1 and y0 <= y1, the outermost pixel centres
            included; None where there is no box.
        mask_logits: (H, W) float32, logits of a previous mask of this object at the slice's own
            resolution (> 0 is foreground); None where there is none.
        text: (D,) float32, an embedded text about the object; None where there is none.
        attention: (H, W) float32, 0 to 1, where something looked for the object; None where nothing did. Both
            are for engines that learned to use them (`sam_infer.tuning`); they say nothing by themselves.
    """

    points: FloatArray = field(default_factory=_no_points)
    point_labels: NDArray[np.int64] = field(default_factory=_no_labels)
    box: Box | None = None
    mask_logits: FloatArray | None = None
    text: FloatArray | None = None
    attention: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or self.points.shape[1] != 2:
            raise ValueError(f"points must have shape (N, 2), got {self.points.shape}")
        if self.point_labels.shape != (len(self.points),):
            raise ValueError(
                f"point_labels must have shape ({len(self.points)},), got {self.point_labels.shape}"
            )
        if self.box is not None and (self.box[0] > self.box[2] or self.box[1] > self.box[3]):
            raise ValueError(f"box must be (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, got {self.box}")

    @property
    def positive(self) -> FloatArray:
        """(P, 2) float32: the foreground points."""
        return self.points[self.point_labels == 1]

    @property
    def negative(self) -> FloatArray:
        """(Q, 2) float32: the background points."""
        return self.points[self.point_labels == 0]

    @property
    def is_empty(self) -> bool:
        """True where nothing says where the object is (no positive point, no box, no mask)."""
        return not len(self.positive) and self.box is None and self.mask_logits is None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Candidate masks for one `Prompts`.

    Args:
        logits: (M, H, W) float32 at the slice's own resolution; > 0 is foreground.
        iou: (M,) float32, the predicted intersection over union of each candidate, 0 to 1.
        crop: The part of the slice that was encoded by itself (`sam_infer.zoom`); None = the whole slice.
    """

    logits: FloatArray
    iou: FloatArray
    crop: Crop | None = None

    @property
    def best(self) -> int:
        """Index of the candidate with the highest predicted IoU."""
        return int(np.argmax(self.iou))

    def mask(self, index: int | None = None) -> BoolArray:
        """(H, W) bool: the candidate's mask, the best one by default."""
        return self.logits[self.best if index is None else index] > 0
