"""How a crop lies in its image: turns, a neighbouring slice's shift, careless boxes.

The frame is a crop's own upright coordinates in slice pixels, its origin the object's centre.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_infer.prompts.simulated import jitter_box
from sam_infer.types import Box


def random_turn(rng: np.random.Generator) -> NDArray[np.float64]:
    """(2, 2) crop frame to image, no net scale.

    Half of them stay upright (mirrored, up to 8 degrees): which way is up is worth knowing. The others are
    flipped, transposed and turned by up to 35 degrees.
    """
    upright = rng.random() < 0.5
    angle = np.deg2rad(rng.uniform(-8, 8) if upright else rng.uniform(-35, 35))
    if rng.random() < 0.4:
        angle = 0.0
    c, s = np.cos(angle), np.sin(angle)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    turn = np.array([[c, -s], [s, c]]) @ np.diag([stretch, 1 / stretch])
    if upright:
        return turn * np.array([[rng.choice([-1, 1]), 1]])
    turn = turn * rng.choice([-1, 1], (1, 2))
    return np.ascontiguousarray(turn[:, ::-1] if rng.random() < 0.5 else turn)


def inverse(m: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a (2, 2) matrix; a linear algebra library would wake threads for it."""
    turned = np.array([[m[1, 1], -m[0, 1]], [-m[1, 0], m[0, 0]]])
    out: NDArray[np.float64] = turned / (m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0])
    return out


def neighbour(
    tight: Box, size: NDArray[np.float64], rng: np.random.Generator
) -> tuple[Callable[[Tensor], Tensor], Box]:
    """How the object lay in a neighbouring slice: a map of the frame and its box there.

    Returns:
        A map of frame coordinates (..., 2) to where the object's own mask is looked up, and the box of
        the mask that this shows.
    """
    scale = (
        np.exp(rng.uniform(-0.3, 0.3, 2))
        if rng.random() < 0.7
        else np.exp(rng.uniform(0.2, 0.9)) * np.ones(2)
    )
    shift = rng.uniform(-0.15, 0.15, 2) * size
    middle = np.array([tight[0] + tight[2], tight[1] + tight[3]]) / 2
    factor, move, pivot = (torch.from_numpy(v.copy()).float() for v in (scale, shift, middle))

    def look_up(grid: Tensor) -> Tensor:
        return (grid - move - pivot) / factor + pivot

    half = size * scale / 2 - 0.5
    seen = (*(middle + shift - half), *(middle + shift + half))
    return look_up, (float(seen[0]), float(seen[1]), float(seen[2]), float(seen[3]))


def jitter_in_frame(box: Box, fraction: float, rng: np.random.Generator) -> Box:
    """`jitter_box` in a frame that has no image border."""
    far = 1e5
    moved = jitter_box(
        (box[0] + far, box[1] + far, box[2] + far, box[3] + far), fraction, rng, (int(3 * far), int(3 * far))
    )
    return moved[0] - far, moved[1] - far, moved[2] - far, moved[3] - far
