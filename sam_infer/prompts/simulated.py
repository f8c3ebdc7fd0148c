"""Prompts that a simulated annotator gives: pure functions of masks and a random generator.

Coordinates are slice pixels xy (x = column, y = row), pixel centres at integers.
"""

from __future__ import annotations

import numpy as np

from sam_infer.geometry import innermost, largest_component
from sam_infer.types import BoolArray, Box


def next_click(truth: BoolArray, mask: BoolArray) -> tuple[float, float, int] | None:
    """The next corrective click: the innermost pixel of the largest error component.

    An error component is a connected set (8-neighbourhood) of pixels that are all missed or all wrongly
    included. The click is the pixel of it with the greatest distance to the component's outside
    (distance transform; the image border counts as outside, the first in row order wins a tie). Of
    components of equal size a missed one goes first.

    Args:
        truth: (H, W) bool, the wanted mask.
        mask: (H, W) bool, the present mask; all False for the first click.

    Returns:
        (x, y, label) in slice pixels, label 1 for a missed part and 0 for a wrongly included part; None
        where the masks are equal.
    """
    if truth.ndim != 2 or truth.shape != mask.shape:
        raise ValueError(f"truth and mask must be (H, W) of equal shape, got {truth.shape}, {mask.shape}")
    truth, mask = truth.astype(bool), mask.astype(bool)
    best: tuple[int, BoolArray, int] | None = None
    for error, label in ((truth & ~mask, 1), (mask & ~truth, 0)):
        if not error.any():
            continue
        component = largest_component(error)
        size = int(component.sum())
        if best is None or size > best[0]:
            best = size, component, label
    if best is None:
        return None
    _, component, label = best
    row, column = innermost(component)
    return float(column), float(row), label


def jitter_box(box: Box, fraction: float, rng: np.random.Generator, image_size: tuple[int, int]) -> Box:
    """A box drawn carelessly: every side moves by its own uniform amount.

    Args:
        box: (x0, y0, x1, y1) in slice pixels.
        fraction: Greatest move of a side, as a fraction of the box's width (x sides) or height (y
            sides), both counted in pixels (a one-pixel box has width 1).
        rng: Source of the four moves, drawn in the order x0, y0, x1, y1.
        image_size: (H, W) in pixels; the result is clipped to it.

    Returns:
        (x0, y0, x1, y1) inside the image, x0 <= x1 and y0 <= y1.
    """
    if fraction < 0:
        raise ValueError(f"fraction must be 0 or more, got {fraction}")
    height, width = image_size
    reach = fraction * np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2, float)
    moved = np.array(box, float) + rng.uniform(-1.0, 1.0, 4) * reach
    x0, x1 = np.clip(np.sort(moved[[0, 2]]), 0, width - 1)
    y0, y1 = np.clip(np.sort(moved[[1, 3]]), 0, height - 1)
    return float(x0), float(y0), float(x1), float(y1)


def shift_box(box: Box, rng: np.random.Generator, image_size: tuple[int, int]) -> Box:
    """A box beside its object: both corners move alike, as in the training of SAM-Med2D (arXiv:2308.16184).

    Args:
        box: (x0, y0, x1, y1) in slice pixels.
        rng: Source of the two moves, whole pixels, dx before dy: each up to half of the box's shorter side
            (counted in pixels) and 5 pixels, either way.
        image_size: (H, W) in pixels; the result is clipped to it.
    """
    height, width = image_size
    reach = min(5, int(0.5 * min(box[2] - box[0] + 1, box[3] - box[1] + 1)))
    dx, dy = rng.integers(-reach, reach, 2, endpoint=True).tolist()
    x0, x1 = np.clip([box[0] + dx, box[2] + dx], 0, width - 1)
    y0, y1 = np.clip([box[1] + dy, box[3] + dy], 0, height - 1)
    return float(x0), float(y0), float(x1), float(y1)
