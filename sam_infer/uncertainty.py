"""How unsure an answer is, pixel by pixel: 0 where it is certain, 1 where it could as well be otherwise.

Maps travel as uint8 on the grid of their label map: 255 is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from sam_infer.types import FloatArray


def binary_entropy(logits: FloatArray) -> FloatArray:
    """Entropy in bits of a foreground probability.

    Args:
        logits: Any shape, float32: the logits of the probability.

    Returns:
        The same shape, float32, 0 to 1: -p log2 p - (1 - p) log2 (1 - p).
    """
    probability = special.expit(logits)
    nats = special.entr(probability) + special.entr(special.expit(-logits))
    return (nats / math.log(2)).astype(np.float32)


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy of the classes that a network chooses from, over the greatest that it can be.

    Args:
        logits: (n, C, H, W) float32, C at least 2.

    Returns:
        (n, H, W) float32, 0 to 1: the entropy of the softmax over log C.
    """
    out: Tensor = torch.special.entr(torch.softmax(logits, dim=1)).sum(dim=1) / math.log(logits.shape[1])
    return out


def as_bytes(uncertainty: FloatArray) -> NDArray[np.uint8]:
    """0..1 as 0..255, rounded; any shape."""
    return np.rint(np.clip(uncertainty, 0, 1) * 255).astype(np.uint8)


def mean_by_label(
    uncertainty: NDArray[np.uint8], labelmap: NDArray[np.uint8], names: Mapping[str, int]
) -> dict[str, float]:
    """Mean uncertainty, 0..1, of the voxels of each label.

    Args:
        uncertainty: (I, J, K) uint8, 255 = 1.
        labelmap: (I, J, K) uint8 on the same grid.
        names: Name to value of the labels that are present.
    """
    sums, counts = np.zeros(256), np.zeros(256)
    for k in range(labelmap.shape[2]):  # slice by slice: weights are float64
        values = labelmap[:, :, k].ravel()
        sums += np.bincount(values, uncertainty[:, :, k].ravel(), minlength=256)
        counts += np.bincount(values, minlength=256)
    return {
        name: round(float(sums[value] / counts[value]) / 255, 4)
        for name, value in names.items()
        if counts[value]
    }
