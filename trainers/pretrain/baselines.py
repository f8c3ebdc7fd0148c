"""Answers to a box that need no network: what a promptable model has to be better than."""

from __future__ import annotations

from typing import Any

import numpy as np
from skimage.filters import threshold_otsu

from sam_infer.types import BoolArray, Box, FloatArray

BASELINES = ("filled box", "filled ellipse", "Otsu in box", "GrabCut")
_ITERATIONS = 5
_AROUND = 0.5  # of the box's size is shown to GrabCut on every side


def baseline(name: str, image: FloatArray, box: Box) -> BoolArray:
    """A trivial answer to a box.

    Args:
        name: One of `BASELINES`.
        image: (H, W) float32 in 0..1.
        box: xyxy in slice pixels, outermost pixel centres included.

    Returns:
        (H, W) bool.

    Raises:
        ModuleNotFoundError: For GrabCut without OpenCV.
    """
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    inside: BoolArray = (x >= box[0] - 0.5) & (x <= box[2] + 0.5) & (y >= box[1] - 0.5) & (y <= box[3] + 0.5)
    half = (box[2] - box[0] + 1) / 2, (box[3] - box[1] + 1) / 2
    radius = ((x - (box[0] + box[2]) / 2) / half[0]) ** 2 + ((y - (box[1] + box[3]) / 2) / half[1]) ** 2
    ellipse: BoolArray = radius <= 1
    if name == "filled box" or not inside.any():
        return inside
    if name == "filled ellipse":
        return ellipse
    return _grabcut(image, inside) if name == "GrabCut" else _otsu(image, inside, ellipse)


def opencv() -> Any:
    """OpenCV, or a `ModuleNotFoundError` that says how to get it."""
    try:
        import cv2
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "the GrabCut baseline needs OpenCV; install it with `pip install -r requirements-dev.txt`, "
            "or measure with --no-baselines"
        ) from missing
    return cv2


def _otsu(image: FloatArray, inside: BoolArray, ellipse: BoolArray) -> BoolArray:
    values = image[inside]
    if values.min() == values.max():
        return inside
    bright: BoolArray = image > threshold_otsu(values)
    # the class that the middle of the box mostly belongs to
    return inside & (
        bright if bright[ellipse & inside].mean() >= bright[inside & ~ellipse].mean() else ~bright
    )


def _grabcut(image: FloatArray, inside: BoolArray) -> BoolArray:
    """Rother, Kolmogorov, Blake: GrabCut (2004), from a box, in the box's surroundings.

    Edges are repeated where the surroundings leave the image, so that there is always a background.
    """
    cv2 = opencv()
    ys, xs = np.nonzero(inside)
    left, top, wide, tall = xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1
    side_x, side_y = (max(int(_AROUND * v), 4) for v in (wide, tall))
    rows = np.clip(np.arange(top - side_y, top + tall + side_y), 0, image.shape[0] - 1)
    columns = np.clip(np.arange(left - side_x, left + wide + side_x), 0, image.shape[1] - 1)
    crop = np.round(np.clip(image[np.ix_(rows, columns)], 0, 1) * 255).astype(np.uint8)
    labels = np.full(crop.shape, cv2.GC_BGD, np.uint8)
    labels[side_y:-side_y, side_x:-side_x] = cv2.GC_PR_FGD
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.stack([crop] * 3, 2), labels, None, *models, _ITERATIONS, cv2.GC_INIT_WITH_MASK)
    found = np.zeros_like(inside)
    part = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    found[top : top + tall, left : left + wide] = part[side_y:-side_y, side_x:-side_x]
    return found
