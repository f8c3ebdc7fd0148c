"""Prompts from a class activation map: the parts that stand out, and a box around them.

Ward and Imran (SAM-Mix, arXiv 2412.08575, figure 1) threshold the normalised map of a classifier and give
SAM the tight box of what passes. Their threshold is not known; 0.4 is that of the authors' later code. Which
part is taken where several pass is this project's own choice: the one with the map's peak. The later code
puts a box in the middle of the image where nothing passes. Nothing of the kind is done here: no evidence, no
prompt.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from sam_infer.geometry import tight_box
from sam_infer.types import BoolArray, Box, FloatArray

#: Share of the normalised map's range from which on a pixel belongs to a part.
THRESHOLD = 0.4


def activation_parts(
    activation: FloatArray, *, threshold: float = THRESHOLD, every: bool = False
) -> list[BoolArray]:
    """The parts of a map that reach a threshold.

    Args:
        activation: (H, W) float32, 0 to 1, the peak at 1.
        threshold: Least value of a part's pixels, above 0 up to 1.
        every: All parts, not only the one with the peak.

    Returns:
        (H, W) bool each, hanging together, over corners too; the one with the highest peak first. Empty
        where nothing reaches the threshold.

    Raises:
        ValueError: When the threshold is not above 0 up to 1.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold = {threshold!r}: must be above 0 and at most 1")
    parts, count = ndimage.label(activation >= threshold, np.ones((3, 3)))
    values = range(1, count + 1)
    peaks = ndimage.maximum(activation, parts, values) if count else []
    order = sorted(values, key=lambda value: -float(peaks[value - 1]))
    return [parts == value for value in (order if every else order[:1])]


def activation_box(activation: FloatArray, *, threshold: float = THRESHOLD) -> Box | None:
    """The tight box of the part with the peak.

    Args:
        activation: As for `activation_parts`.
        threshold: As for `activation_parts`.

    Returns:
        (x0, y0, x1, y1) in slice pixels, the outermost included; None where nothing reaches the threshold.
    """
    parts = activation_parts(activation, threshold=threshold)
    return tight_box(parts[0]) if parts else None


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1) of whole pixels, the outermost included."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1.0
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1.0
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0] + 1.0) * (box[3] - box[1] + 1.0)
