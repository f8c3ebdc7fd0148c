"""A fully connected conditional random field of two labels, as MedCLIP-SAM makes masks of saliency maps.

After Kraehenbuehl and Koltun (2011), with the settings of MedCLIP-SAM's code. Messages are summed over all
pairs of pixels, without the approximation that those authors need for whole images; so that this is quick
the slice is looked at on a grid of at most `GRID` cells a side, which is this project's own choice. The
distances stay those of the slice's own pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from sam_infer.types import BoolArray, FloatArray

#: Most cells a side.
GRID = 64
#: Published: spread of the smoothness term in pixels and its weight, and of the appearance term in pixels and
#: in grey values of 255, and its weight; temperature of the unary terms; steps.
SMOOTH = (3.0, 3.0)
APPEARANCE = (60.0, 5.0, 5.0)
TAU = 1.05
STEPS = 1
_EPSILON = 1e-8


def crf(saliency: FloatArray, pixels: FloatArray) -> BoolArray:
    """What stands out of a saliency map, along the slice's own edges.

    Args:
        saliency: (H, W) float32, 0..1.
        pixels: (H, W) or (H, W, 3) float32, 0..1, the slice.

    Returns:
        (H, W) bool.
    """
    size = saliency.shape
    rows, columns = (min(side, GRID) for side in size)
    colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)
    grid = _resized(np.concatenate([saliency[..., None], colour], axis=-1), (rows, columns))
    steps = (size[0] / rows, size[1] / columns)
    found = mean_field(unary(grid[..., 0]), Pairs.of(grid[..., 1:] * 255, steps))
    return _resized(found[..., 1:], (size[0], size[1]))[..., 0] > 0.5


def unary(saliency: NDArray) -> NDArray[np.float64]:
    """What each label costs at each cell: (R, C, 2) for background and object, of (R, C) in 0..1."""
    energies = [-np.log(one + _EPSILON) / (TAU * expit(one)) for one in (1.0 - saliency, saliency)]
    return np.stack(energies, axis=-1).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What all cells of a grid of R rows and C columns say to each other.

    Each kernel is normalised on both sides by the roots of its row sums, and a cell is among its own
    neighbours, as in the authors' code. The smoothness kernel is one of rows times one of columns.

    Args:
        rows: (R, R) float32, normalised.
        columns: (C, C) float32, normalised.
        appearance: (R C, R C) float32, not normalised.
        roots: (R C, 1) float32, that normalise it on either side.
    """

    rows: FloatArray
    columns: FloatArray
    appearance: FloatArray
    roots: FloatArray

    @classmethod
    def of(cls, values: NDArray, steps: tuple[float, float]) -> Pairs:
        """The kernels of a slice.

        Args:
            values: (R, C, channels) in 0..255.
            steps: Distance of neighbouring rows and columns in pixels.
        """
        lines = [
            np.arange(n, dtype=np.float32)[:, None] * np.float32(step)
            for n, step in zip(values.shape, steps, strict=False)
        ]
        places = np.stack(np.meshgrid(*[line[:, 0] for line in lines], indexing="ij"), axis=-1)
        features = np.concatenate([places / APPEARANCE[0], values / APPEARANCE[1]], axis=-1)
        appearance = _kernel(features.reshape(-1, features.shape[-1]))
        rows, columns = (_kernel(line / np.float32(SMOOTH[0])) for line in lines)
        return cls(
            rows=rows * _roots(rows) * _roots(rows).T,
            columns=columns * _roots(columns) * _roots(columns).T,
            appearance=appearance,
            roots=_roots(appearance),
        )

    def messages(self, labels: NDArray) -> NDArray:
        """What the cells hear, weighted, of (R, C, 2) probabilities."""
        flat = labels.reshape(-1, labels.shape[-1]).astype(np.float32)
        smooth = np.einsum("ab,bcl,cd->adl", self.rows, labels, self.columns, optimize=True)
        alike = self.roots * (self.appearance @ (self.roots * flat))
        heard: NDArray = SMOOTH[1] * smooth + APPEARANCE[2] * alike.reshape(labels.shape)
        return heard


def mean_field(energies: NDArray, pairs: Pairs, steps: int = STEPS) -> NDArray:
    """Mean-field inference with the Potts model.

    Args:
        energies: (R, C, 2) unary energies.
        pairs: The kernels.
        steps: How often messages are passed; one is published.

    Returns:
        (R, C, 2) probabilities.
    """
    found = softmax(-energies, axis=-1)
    for _ in range(steps):
        found = softmax(pairs.messages(found) - energies, axis=-1)
    return found


def _kernel(features: NDArray) -> FloatArray:
    """(n, n): exp of minus half the squared distances of (n, F)."""
    centred = np.asarray(features - features.mean(axis=0), np.float32)
    lengths = 0.5 * np.square(centred).sum(axis=1)
    exponents = centred @ centred.T
    exponents -= lengths
    exponents -= lengths[:, None]
    np.minimum(exponents, 0, out=exponents)
    kernel: FloatArray = np.exp(exponents, out=exponents)
    return kernel


def _roots(kernel: FloatArray) -> FloatArray:
    roots: FloatArray = 1 / np.sqrt(kernel.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return roots


def _resized(image: NDArray, size: tuple[int, int]) -> NDArray:
    """(H, W, C) resampled: the mean where it shrinks, linear where it grows."""
    import torch
    from torch.nn import functional as F

    stacked = torch.from_numpy(np.ascontiguousarray(image, np.float32)).permute(2, 0, 1)[None]
    out = F.interpolate(stacked, size, mode="bilinear", antialias=True, align_corners=False)
    resized: NDArray = out[0].permute(1, 2, 0).numpy()
    return resized
