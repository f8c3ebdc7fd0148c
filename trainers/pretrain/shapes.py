"""Building blocks of the images made by code: smooth noise, warped ellipses, soft edges, speckle."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.types import FloatArray

LabelArray = NDArray[np.uint8]
Made = tuple[FloatArray, LabelArray]
SIDE = 224


def smooth_noise(rng: np.random.Generator, cells: int, side: int = SIDE) -> FloatArray:
    """(side, side) float32: smooth random field of about unit deviation, `cells` bumps across."""
    coarse = rng.standard_normal((1, 1, cells + 3, cells + 3)).astype(np.float32)
    fine = F.interpolate(torch.from_numpy(coarse), size=(side, side), mode="bicubic", align_corners=False)
    out: FloatArray = fine[0, 0].numpy()
    return out


class Plane:
    """Warped coordinates in which plain ellipses become organic shapes.

    Args:
        rng: Source of the warp.
        strength: Of the warp; 1 moves by about 8 pixels.
    """

    def __init__(self, rng: np.random.Generator, strength: float) -> None:
        y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        self.x = x + strength * (8 * smooth_noise(rng, 4) + 3 * smooth_noise(rng, 12))
        self.y = y + strength * (8 * smooth_noise(rng, 4) + 3 * smooth_noise(rng, 12))

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, angle: float, power: float = 2.0
    ) -> FloatArray:
        """(S, S) float32: 1 at the centre, 0 on the contour, negative outside (in radii)."""
        c, s = np.cos(angle), np.sin(angle)
        u = ((self.x - cx) * c + (self.y - cy) * s) / rx
        v = (-(self.x - cx) * s + (self.y - cy) * c) / ry
        if power == 2.0:
            return 1 - np.sqrt(u * u + v * v)
        out: FloatArray = 1 - (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
        return out


def blob(plane: Plane, rng: np.random.Generator, low: float, high: float) -> tuple[FloatArray, float]:
    """A random (super)ellipse: its level field (`Plane.ellipse`) and its smaller radius in pixels."""
    rx = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    ry = rx * float(np.exp(rng.uniform(-0.8, 0.8)))
    cx, cy = rng.uniform(0.1 * SIDE, 0.9 * SIDE, 2)
    power = 2.0 if rng.random() < 0.7 else float(rng.uniform(1.5, 4))
    return plane.ellipse(cx, cy, rx, ry, rng.uniform(0, np.pi), power), min(rx, ry)


def soft_edge(level: FloatArray, radius: float, width: float) -> FloatArray:
    """0..1 membership with an edge of about `width` pixels around the contour."""
    t = np.clip(level * radius / max(width, 0.5) * 0.5 + 0.5, 0, 1)
    out: FloatArray = t * t * (3 - 2 * t)
    return out


def speckle(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """(S, S) float32: the image times smoothed noise around 1."""
    grain = rng.standard_normal(image.shape).astype(np.float32)
    grain = ndimage.gaussian_filter(grain, [rng.uniform(0.4, 1.2), rng.uniform(0.6, 2.0)])
    out: FloatArray = image * (1 + rng.uniform(0.1, 0.45) * grain / (grain.std() + 1e-6))
    return out
