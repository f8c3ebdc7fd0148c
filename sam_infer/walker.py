"""How like painted strokes each pixel is: a random walk over the image that ends at a stroke."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import block_reduce
from skimage.segmentation import random_walker

from sam_infer.geometry import tight_box
from sam_infer.types import BoolArray, FloatArray

#: How much an edge hinders the walk.
BETA = 2000.0
#: Longest side of the grid that is walked, in cells: its equations are then solved directly, in time that
#: does not depend on the image.
SIDE = 128
#: How far beyond the strokes the walk goes, as a share of their extent; what lies beyond is not judged.
MARGIN = 0.25
_LEAST = 1e-3


def walker_logits(image: FloatArray, foreground: BoolArray, background: BoolArray) -> FloatArray:
    """Logits that a random walker from each pixel meets a foreground stroke first (Grady, PAMI 2006).

    Args:
        image: (H, W) or (H, W, 3) float32 in 0..1.
        foreground: (H, W) bool, painted pixels, not empty.
        background: (H, W) bool, painted pixels, not empty.

    Returns:
        (H, W) float32; 0 where it cannot be told: far from every stroke, or cut off from all of them.
    """
    rows, columns = _around(foreground | background)
    grey = image.mean(axis=-1) if image.ndim == 3 else image
    stride = -(-max(rows.stop - rows.start, columns.stop - columns.start) // SIDE)
    grey, inside, outside = (layer[rows, columns] for layer in (grey, foreground, background))
    size = grey.shape
    grey = block_reduce(np.pad(grey, [(0, -n % stride) for n in size], mode="edge"), stride, np.mean)
    inside, outside = (block_reduce(layer, stride, np.any) for layer in (inside, outside))
    probability = _walk(grey, inside, outside)
    clipped = probability.clip(_LEAST, 1 - _LEAST)
    cells = np.log(clipped / (1 - clipped))
    fine = ndimage.zoom(cells, stride, order=1, grid_mode=True, mode="nearest")[: size[0], : size[1]]
    logits = np.zeros(foreground.shape, np.float32)
    logits[rows, columns] = fine
    return logits


def _walk(grey: FloatArray, inside: BoolArray, outside: BoolArray) -> NDArray[np.float64]:
    """(h, w) probability of meeting ``inside`` first; where both were painted in one cell, inside counts."""
    seeds = np.zeros(grey.shape, np.int32)
    seeds[outside] = 2
    seeds[inside] = 1
    if not (seeds == 2).any() or not (seeds == 0).any():
        return np.where(seeds == 1, 1.0, np.where(seeds == 2, 0.0, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding that leaves 0..1 by a hair is clipped by the caller
        found = random_walker(grey, seeds, beta=BETA, mode="bf", return_full_prob=True)
    return np.nan_to_num(found[0], nan=0.5)


def _around(strokes: BoolArray) -> tuple[slice, slice]:
    box = tight_box(strokes)
    assert box is not None
    x0, y0, x1, y1 = (int(v) for v in box)
    dx, dy = int(MARGIN * (x1 - x0 + 1)) + 8, int(MARGIN * (y1 - y0 + 1)) + 8
    height, width = strokes.shape
    return slice(max(0, y0 - dy), min(height, y1 + dy + 1)), slice(max(0, x0 - dx), min(width, x1 + dx + 1))
