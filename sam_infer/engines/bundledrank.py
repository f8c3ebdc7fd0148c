"""How good a candidate probably is: a calibrated line over a few plain features, and the ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_infer.types import Candidates, FloatArray, Prompts

FEATURES = ("predicted_iou", "stability", "agreement")
KEPT = 3
_LEAST, _PER_BROKEN_CLICK = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The uncalibrated answer to one prompt.

    Args:
        logits: (M, H, W) float32, one for each window that was tried.
        features: (M, 3) float64, columns `FEATURES`: the network's own IoU, how little the mask changes
            from a strict to a lax threshold, and the mean IoU with the other windows' masks (0 where
            there is only one).
    """

    logits: FloatArray
    features: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Lines from features to the IoU that is really reached.

    Args:
        one: (offset, predicted_iou, stability) for an answer of one window.
        several: (offset, predicted_iou, stability, agreement) for windows beside each other.
    """

    one: tuple[float, ...] = (0.0, 1.0, 0.0)
    several: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)

    def iou(self, features: NDArray[np.float64]) -> FloatArray:
        """(M, 3) features to (M,) float32 in 0..1."""
        line = self.one if len(features) == 1 else self.several
        weights = np.array(line[1:])
        value = line[0] + features[:, : len(weights)] @ weights
        return np.clip(value, 0.0, 1.0).astype(np.float32)


def agreement(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(M,): mean IoU of each of M masks (M, H, W) with the others; 0 for one mask alone."""
    count = len(masks)
    if count < 2:
        return np.zeros(count)
    table = np.zeros((count, count))
    sizes = [int(np.count_nonzero(mask)) for mask in masks]
    for a in range(count):
        for b in range(a):
            both = int(np.count_nonzero(masks[a] & masks[b]))
            table[a, b] = table[b, a] = both / max(sizes[a] + sizes[b] - both, 1)
    mean: NDArray[np.float64] = table.sum(1) / (count - 1)
    return mean


def ranked(logits: FloatArray, iou: FloatArray, prompt: Prompts) -> Candidates:
    """The best candidates, best first; every click that a mask disobeys cuts its IoU to a twentieth.

    Args:
        logits: (M, H, W) float32.
        iou: (M,) float32, calibrated.
        prompt: Whose clicks to obey.
    """
    height, width = logits.shape[1:]
    x = np.clip(np.rint(prompt.points[:, 0]), 0, width - 1).astype(int)
    y = np.clip(np.rint(prompt.points[:, 1]), 0, height - 1).astype(int)
    broken = ((logits[:, y, x] > 0) != (prompt.point_labels == 1)).sum(1)
    cut = np.maximum(iou, _LEAST) * _PER_BROKEN_CLICK**broken
    score = np.where(broken, cut, iou).astype(np.float32)
    order = np.argsort(-score, kind="stable")[:KEPT]
    return Candidates(logits=np.ascontiguousarray(logits[order]), iou=score[order])
