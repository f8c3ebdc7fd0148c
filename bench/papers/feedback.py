"""Who prefers which candidate, in a table: annotators that see the truth, and ones that do not.

Konwer et al. (2025, arXiv 2503.04639) have candidates of every "unlabelled" image rated by their overlap with
its truth. That is weak, ordinal supervision, not learning without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_infer.candidates import (
    CandidateSet,
    overlaps,
    ranking_of,
    swap_adjacent,
    swap_levels,
    virtual_ratings,
)
from sam_infer.types import BoolArray

#: Gives the (S, S) bool truth of an image; that it is asked for tells that somebody looked at it.
Truth = Callable[[], BoolArray]
#: (N,) float64, higher is better, of the candidates of one image.
Annotator = Callable[[CandidateSet, Truth, np.random.Generator], NDArray[np.float64]]


def by_overlap(candidates: CandidateSet, truth: Truth, rng: np.random.Generator) -> NDArray[np.float64]:
    """A ranking by overlap with the truth; candidates that overlap alike are tied."""
    return overlaps(candidates.masks, truth())


def by_rating(candidates: CandidateSet, truth: Truth, rng: np.random.Generator) -> NDArray[np.float64]:
    """The published four ratings of the overlap with the truth; many are tied."""
    return virtual_ratings(candidates.masks, truth()).astype(np.float64)


def by_prediction(candidates: CandidateSet, truth: Truth, rng: np.random.Generator) -> NDArray[np.float64]:
    """SAM's own predicted IoU; the truth is not looked at."""
    return np.array(candidates.predicted_iou, np.float64)


def by_chance(candidates: CandidateSet, truth: Truth, rng: np.random.Generator) -> NDArray[np.float64]:
    """Any order; the truth is not looked at."""
    return rng.permutation(len(candidates.masks)).astype(np.float64)


ANNOTATORS: Mapping[str, Annotator] = {
    "overlap": by_overlap,
    "rating": by_rating,
    "prediction": by_prediction,
    "chance": by_chance,
}
#: Those that look at the truth of what they rate.
INFORMED = frozenset({"overlap", "rating"})


def with_noise(
    scores: NDArray[np.float64], share: float, rng: np.random.Generator, *, levels: bool = False
) -> NDArray[np.float64]:
    """Scores of an annotator who takes two neighbours for each other, in a share of the images.

    Args:
        scores: (R, N), of each image's candidates.
        share: 0 to 1.
        rng: Draws images and neighbours.
        levels: Whether neighbours are levels of a rating (`sam_infer.candidates.swap_levels`), or candidates
            in rank (`sam_infer.candidates.swap_adjacent`).

    Returns:
        (R, N): the scores of each image, of other candidates.
    """
    if levels:
        return swap_levels(scores.astype(np.int64), share, rng).astype(np.float64)
    rankings = np.array([ranking_of(row) for row in scores], np.int64)
    swapped = swap_adjacent(rankings, share, rng)
    out = np.empty_like(scores)
    np.put_along_axis(out, swapped, np.take_along_axis(scores, rankings, 1), 1)
    return out


def directions(candidates: Sequence[CandidateSet], scores: NDArray[np.float64]) -> dict[str, Any]:
    """Where preferences point.

    Args:
        candidates: Of R images.
        scores: (R, N).

    Returns:
        ``loosest`` and ``strictest``: the share of the images of which the largest and the smallest candidate
        is better than all others that differ from it; the rest prefers one between, or nothing.
    """
    found = {"loosest": 0, "strictest": 0}
    for one, row in zip(candidates, scores, strict=True):
        areas = np.array(one.areas)
        for name, edge in (("loosest", areas.max()), ("strictest", areas.min())):
            others = row[areas != edge]
            found[name] += bool(len(others) and row[areas == edge].max() > others.max())
    return {name: count / max(1, len(candidates)) for name, count in found.items()}
