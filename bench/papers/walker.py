"""The random walk as a baseline that is fair: masks and background are eroded, so that a band is unknown.

In the authors' code nothing was left unseeded; seeds, widths and edge weight here are those that they set by
hand before (background eroded by 12 pixels and masks by about 3 at 384 x 224, sigma 10 grey values).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import random_walker
from skimage.transform import resize

from bench.papers.sets import LabelImage
from sam_infer.types import FloatArray

#: Longest side in pixels of the grid that is walked: that of the paper's images.
SIDE = 384
_BACKGROUND = 255


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How an image is walked.

    Args:
        inner: Pixels by which masks are eroded, on a grid of `SIDE`; the innermost pixels always stay.
        outer: Pixels by which the background is eroded.
        sigma: Grey values (0..255): an edge weighs exp(-(difference / sigma)^2).
    """

    inner: float = 3.0
    outer: float = 10.0
    sigma: float = 10.0


def seeds_of(masks: LabelImage, walk: Walk) -> NDArray[np.int32]:
    """What is known of each pixel.

    Args:
        masks: (H, W) uint8 label values, on the grid that is walked.
        walk: How far the seeds keep from the masks' borders.

    Returns:
        (H, W): a label value, 255 = background, 0 = unknown.
    """
    seeds = np.zeros(masks.shape, np.int32)
    seeds[ndimage.distance_transform_edt(masks == 0) > walk.outer] = _BACKGROUND
    for value, box in enumerate(ndimage.find_objects(masks), start=1):
        if box is not None:
            depth = ndimage.distance_transform_edt(np.pad(masks[box] == value, 1))[1:-1, 1:-1]
            seeds[box][depth > min(walk.inner, float(depth.max()) - 1e-6)] = value
    return seeds


def walked(image: FloatArray, masks: LabelImage, walk: Walk | None = None) -> LabelImage:
    """Draw the borders of masks anew by a random walk over the image (Grady, PAMI 2006).

    Args:
        image: (H, W) float32 in 0..1.
        masks: (H, W) uint8 label values.
        walk: How; None = as `Walk` stands.

    Returns:
        (H, W) uint8 label values; the masks themselves where there are no seeds of two kinds.
    """
    scale = min(1.0, SIDE / max(masks.shape))
    size = tuple(max(1, round(side * scale)) for side in masks.shape)
    grey = resize(image, size, order=1, anti_aliasing=scale < 1) * 255.0
    coarse = resize(masks, size, order=0, preserve_range=True, anti_aliasing=False).astype(np.uint8)
    walk = walk or Walk()
    seeds = seeds_of(coarse, walk)
    kinds = np.unique(seeds[seeds > 0])
    if len(kinds) < 2 or (seeds > 0).all():
        return masks
    order = np.searchsorted(kinds, seeds) + 1
    order[seeds == 0] = 0
    # random_walker divides by ten standard deviations of the image; this takes it back.
    beta = 10.0 * max(float(grey.std()), 1e-6) / walk.sigma**2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pixels that nothing reaches are told; they count as background
        found = random_walker(grey, order, beta=beta, mode="cg_j", tol=1e-3)
    values = np.concatenate([[0], np.where(kinds == _BACKGROUND, 0, kinds)]).astype(np.uint8)
    out = resize(
        values[np.clip(found, 0, None)], masks.shape, order=0, preserve_range=True, anti_aliasing=False
    )
    return out.astype(np.uint8)
