"""Candidate masks of one object for somebody to rate or rank, and who stands in for that somebody.

After Konwer et al. (2025, arXiv 2503.04639): a model's probability map is cut at four thresholds, and a
virtual annotator rates or ranks the four masks by how well they overlap with the truth. Other sources of
candidates are this project's own choice or named below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sam_infer.types import BoolArray, Candidates, FloatArray

Source = Literal["thresholds", "masks", "dropout"]
SOURCES: tuple[Source, ...] = get_args(Source)
#: Thresholds of the probability map, as published.
THRESHOLDS = (0.3, 0.4, 0.5, 0.6)
#: IoU between the virtual annotator's four ratings, as published.
LEVELS = (0.40, 0.55, 0.70)
#: Candidates of one set: one bit each of a byte.
MAX_CANDIDATES = 8
#: Indices of candidates, best first.
Ranking = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CandidateSet:
    """Candidate masks of one object on one slice. Equal masks stay: their weights cancel or add up.

    Args:
        masks: (N, H, W) bool, N from 2 to `MAX_CANDIDATES`, at the slice's own resolution.
        source: What they were made by.
        thresholds: Of each candidate, where thresholds made them; else empty.
        predicted_iou: 0 to 1, of each candidate, where the engine predicted one for each; else empty.
    """

    masks: BoolArray
    source: Source
    thresholds: tuple[float, ...] = ()
    predicted_iou: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or not 2 <= len(self.masks) <= MAX_CANDIDATES:
            raise ValueError(f"masks must have shape (2..{MAX_CANDIDATES}, H, W), got {self.masks.shape}")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        for name, values in (("thresholds", self.thresholds), ("predicted_iou", self.predicted_iou)):
            if values and len(values) != len(self.masks):
                raise ValueError(f"{name} must have {len(self.masks)} values or none, got {len(values)}")

    @property
    def areas(self) -> list[int]:
        """Pixels of each candidate."""
        return [int(area) for area in self.masks.sum((1, 2))]

    @property
    def distinct(self) -> int:
        """How many candidates differ from all before them."""
        return len({mask.tobytes() for mask in self.masks})

    @property
    def bits(self) -> NDArray[np.uint8]:
        """(H, W) uint8: bit n is set where candidate n is."""
        held = self.masks.astype(np.uint8) << np.arange(len(self.masks), dtype=np.uint8)[:, None, None]
        bits: NDArray[np.uint8] = np.bitwise_or.reduce(held, axis=0)
        return bits


def masks_of_bits(bits: NDArray[np.uint8], count: int) -> BoolArray:
    """The (N, H, W) bool masks of `CandidateSet.bits`.

    Args:
        bits: (H, W) uint8.
        count: N.

    Raises:
        ValueError: When a bit is set that belongs to no candidate.
    """
    if not 0 < count <= MAX_CANDIDATES or (bits >> (count - 1) > 1).any():
        raise ValueError(f"the map holds more than {count} candidates")
    held: BoolArray = bits >> np.arange(count, dtype=np.uint8)[:, None, None] & 1 == 1
    return held


def by_thresholds(probability: FloatArray, thresholds: Sequence[float] = THRESHOLDS) -> CandidateSet:
    """Candidates that lie in one another: where a probability is greater than each threshold.

    Args:
        probability: (H, W) float32, 0 to 1.
        thresholds: In the order of the candidates.
    """
    masks = probability > np.asarray(thresholds, np.float32)[:, None, None]
    return CandidateSet(masks=masks, source="thresholds", thresholds=tuple(float(t) for t in thresholds))


def by_masks(found: Candidates) -> CandidateSet:
    """All the masks that an engine answers one prompt with, such as SAM's three, in its order.

    Of more than `MAX_CANDIDATES` those with the highest predicted IoU stay. Those who tried to reproduce the
    method suggest these masks, since they differ more than thresholds do.

    Raises:
        ValueError: When there are fewer than two.
    """
    kept = sorted(ranking_of(found.iou)[:MAX_CANDIDATES])
    quality = tuple(round(float(found.iou[n]), 4) for n in kept)
    return CandidateSet(masks=found.logits[kept] > 0, source="masks", predicted_iou=quality)


def by_dropout(logits: FloatArray) -> CandidateSet:
    """The masks of several stochastic passes of a model.

    Args:
        logits: (N, H, W) float32, one pass each; > 0 is foreground.
    """
    return CandidateSet(masks=logits > 0, source="dropout")


def overlaps(masks: BoolArray, truth: BoolArray) -> NDArray[np.float64]:
    """(N,): IoU of each of (N, H, W) bool masks with an (H, W) bool one; 1 where both are empty."""
    union = (masks | truth).sum((1, 2))
    out: NDArray[np.float64] = np.where(union > 0, (masks & truth).sum((1, 2)) / np.maximum(union, 1), 1.0)
    return out


def virtual_ratings(
    masks: BoolArray, truth: BoolArray, levels: Sequence[float] = LEVELS
) -> NDArray[np.int64]:
    """What the virtual annotator rates candidates with: 1 below the first IoU level, one more beyond each.

    As published, below 0.40 is 1 and above 0.70 is 4. So a first level itself belongs to what is above it, a
    last one to what is below; that those between belong above is this project's own choice.

    Args:
        masks: (N, H, W) bool.
        truth: (H, W) bool.
        levels: IoU, ascending.

    Returns:
        (N,) int64, 1 to ``len(levels) + 1``.
    """
    found = overlaps(masks, truth)[:, None]
    between = np.asarray(levels[:-1], np.float64)
    ratings: NDArray[np.int64] = 1 + (found >= between).sum(1) + (found[:, 0] > levels[-1])
    return ratings


def ranking_of(scores: Sequence[float] | NDArray) -> Ranking:
    """Candidates, best first, from a score of each.

    Tied candidates keep the order in which they are given; how ties are broken is not published, so this is
    the project's own choice.

    Args:
        scores: (N,), higher is better.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    return tuple(int(n) for n in order)


def ranked_by_mask(masks: BoolArray, accepted: BoolArray) -> Ranking:
    """The ranking that an accepted mask gives to candidates, at no extra work: by IoU with it.

    Args:
        masks: (N, H, W) bool.
        accepted: (H, W) bool.
    """
    return ranking_of(overlaps(masks, accepted))


def swap_adjacent(
    rankings: NDArray[np.int64], share: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Noise of a ranking annotator: in a share of the samples, two neighbours in rank change places.

    That the samples are drawn without replacement, and their pair of neighbours evenly, is this project's own
    choice.

    Args:
        rankings: (S, N) int64, candidates of each sample, best first.
        share: 0 to 1, of the samples; rounded to whole ones.
        generator: Draws them.

    Returns:
        (S, N) int64, a copy.
    """
    out = rankings.copy()
    for sample in _drawn(len(out), share, generator):
        place = int(generator.integers(out.shape[1] - 1))
        out[sample, [place, place + 1]] = out[sample, [place + 1, place]]
    return out


def swap_levels(
    ratings: NDArray[np.int64], share: float, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Noise of a rating annotator: in a share of the samples, two neighbouring levels change places.

    The levels are those that the sample's candidates have; where all have one, nothing can change. This
    reading of the published noise, and how pairs are drawn (evenly), are this project's own choice.

    Args:
        ratings: (S, N) int64, a rating of each candidate of each sample.
        share: 0 to 1, of the samples; rounded to whole ones.
        generator: Draws them.

    Returns:
        (S, N) int64, a copy.
    """
    out = ratings.copy()
    for sample in _drawn(len(out), share, generator):
        levels = np.unique(out[sample])
        if len(levels) > 1:
            first = int(generator.integers(len(levels) - 1))
            low, high = (out[sample] == levels[n] for n in (first, first + 1))
            out[sample, low], out[sample, high] = levels[first + 1], levels[first]
    return out


def _drawn(samples: int, share: float, generator: np.random.Generator) -> NDArray[np.int64]:
    return generator.choice(samples, round(share * samples), replace=False)
