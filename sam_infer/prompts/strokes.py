"""Painted strokes as points: a few that stand for all of a stroke."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.morphology import skeletonize

from sam_infer.types import BoolArray, FloatArray

#: Points closer than this to one that was taken, in pixels, add nothing.
APART = 2.0


def stroke_points(strokes: BoolArray, count: int) -> FloatArray:
    """Points spread over the middle lines of strokes, by farthest-point sampling (Eldar et al., 1997).

    The first is the one nearest to the centre of the lines, every next the one that is farthest from all
    that were taken, so that few points reach every stroke and all of its length.

    Args:
        strokes: (H, W) bool, painted pixels.
        count: Points at most.

    Returns:
        (N, 2) float32, xy in slice pixels, N <= count, each on a painted pixel.
    """
    rows, columns = np.nonzero(skeletonize(strokes) if count and strokes.any() else np.zeros_like(strokes))
    if not len(rows):
        rows, columns = (axis[:count] for axis in np.nonzero(strokes))
    points = np.stack([columns, rows], axis=1).astype(np.float32)
    return points[_farthest(points, count)]


def _farthest(points: FloatArray, count: int) -> NDArray[np.int64]:
    """Indices of up to ``count`` of (N, D) points that lie far apart."""
    if not len(points) or not count:
        return np.zeros(0, np.int64)
    taken = [int(np.argmin(((points - points.mean(0)) ** 2).sum(1)))]
    distance = ((points - points[taken[0]]) ** 2).sum(1)
    while len(taken) < count and distance.max() >= APART**2:
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[taken[-1]]) ** 2).sum(1))
    return np.array(taken, np.int64)
