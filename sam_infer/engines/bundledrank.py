"""How good a candidate probably is: a calibrated line over a few plain features, and the ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_infer.types import Candidates, FloatArray, Prompts

FEATURES = ("predicted_iou", "stability", "steadiness", "certainty", "enclosure", "agreement")
STEADINESS = FEATURES.index("steadiness")
KINDS = ("one", "clicks", "corrected")
KEPT = 3
_OWN = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # the network's own prediction as it is
_LEAST, _PER_BROKEN_CLICK = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The uncalibrated answer to one prompt.

    Args:
        logits: (M, H, W) float32, one for each window that was tried.
        features: (M, 6) float64 in 0..1, columns `FEATURES`: the network's own IoU, those of `quality`,
            and the mean IoU with the other windows' masks (0 where there is only one).
        kind: Which line of `Calibration` it takes.
    """

    logits: FloatArray
    features: NDArray[np.float64]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Lines from features to the IoU that is really reached.

    Each is an offset and a weight for each of `FEATURES`.

    Args:
        one: For an answer of the one window that a box or a mask gives.
        clicks: For the windows that are tried for clicks alone.
        corrected: For those that are tried for clicks beside a previous mask.
    """

    one: tuple[float, ...] = _OWN
    clicks: tuple[float, ...] = _OWN
    corrected: tuple[float, ...] = _OWN

    def iou(self, answer: Answer) -> FloatArray:
        """(M,) float32 in 0..1: the IoU that each mask probably reaches."""
        line: tuple[float, ...] = getattr(self, answer.kind)
        value = line[0] + answer.features @ np.array(line[1:])
        return np.clip(value, 0.0, 1.0).astype(np.float32)


def quality(first: Tensor, logits: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    """Plain signs of a good answer, each (B,) float32 in 0..1.

    Args:
        first: (B, S, S) logits of the first look.
        logits: (B, S, S) logits of the last look; those of the first where there was only one.
        valid: (B, S, S), 1 inside the slice image.

    Returns:
        stability: how little the mask changes from a strict to a lax threshold. steadiness: IoU of
        the first and the last look. certainty: mean probability inside the mask. enclosure: share of the
        crop's border, where it lies in the image, that is free of the mask.
    """
    mask, before = logits > 0, first > 0
    stability = (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2)).clamp_min(1)
    steadiness = (mask & before).sum((1, 2)) / (mask | before).sum((1, 2)).clamp_min(1)
    certainty = (torch.sigmoid(logits) * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
    rim = valid.clone()
    rim[:, 1:-1, 1:-1] = 0
    enclosure = 1 - (mask * rim).sum((1, 2)) / rim.sum((1, 2)).clamp_min(1)
    return stability, steadiness, certainty, enclosure


def iou_of(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """IoU of two masks (H, W); 0 where both are empty."""
    both = int(np.count_nonzero(a & b))
    return both / max(int(np.count_nonzero(a)) + int(np.count_nonzero(b)) - both, 1)


def agreement(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(M,): mean IoU of each of M masks (M, H, W) with the others; 0 for one mask alone."""
    count = len(masks)
    if count < 2:
        return np.zeros(count)
    table = np.zeros((count, count))
    for a in range(count):
        for b in range(a):
            table[a, b] = table[b, a] = iou_of(masks[a], masks[b])
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
