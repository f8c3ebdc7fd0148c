"""From a saliency map to prompts: a coarse mask, its parts, and of each a box and points.

The box of the largest part is MedCLIP-SAM's; "every contour" is its option, and so is keeping the two largest
for lungs. Konwer et al. (arXiv 2503.04639) prompt with the box and with points; how many and where is not
known. Eight, drawn uniformly with replacement inside the part, all positive, is a re-implementer's choice and
the default here. Nothing is prompted where the mask is empty: MedCLIP-SAM takes the whole slice then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from sam_infer.clip.crf import crf
from sam_infer.geometry import tight_box
from sam_infer.parts import Part
from sam_infer.prompts.masks import large_parts, parts_of
from sam_infer.types import BoolArray, FloatArray, Prompts

#: Points inside each part.
POINTS = 8
#: "largest"; "large" = all but the small ones (`sam_infer.prompts.masks.large_parts`); n = the n largest.
Keep = Literal["largest", "large"] | int
#: Side of what the clusters are made from, published.
_SIDE = 256


def kmeans(saliency: FloatArray, pixels: FloatArray) -> BoolArray:
    """The brighter of two clusters of a map's values, as MedCLIP-SAMv2 makes masks.

    Args:
        saliency: (H, W) float32, 0..1.
        pixels: Not looked at.

    Returns:
        (H, W) bool; empty where the map is the same everywhere.
    """
    from sklearn.cluster import KMeans

    if saliency.min() == saliency.max():
        return np.zeros(saliency.shape, bool)
    rows, columns = (np.arange(min(side, _SIDE)) * side // min(side, _SIDE) for side in saliency.shape)
    clusters = KMeans(n_clusters=2, random_state=10).fit(saliency[np.ix_(rows, columns)].reshape(-1, 1))
    brighter: BoolArray = saliency > clusters.cluster_centers_.mean()
    return brighter


#: What makes a coarse mask of a map, by name: (map (H, W), slice (H, W) or (H, W, 3)) -> (H, W) bool.
REGIONS: dict[str, Callable[[FloatArray, FloatArray], BoolArray]] = {"crf": crf, "kmeans": kmeans}


def kept_parts(mask: BoolArray, keep: Keep = "largest") -> list[BoolArray]:
    """The parts of a mask that hang together, over corners too, the largest first.

    Args:
        mask: (H, W) bool.
        keep: Which of them.

    Returns:
        (H, W) bool each; none where the mask is empty.

    Raises:
        ValueError: When ``keep`` is a number below 1.
    """
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep = {keep}: must be 1 or more")
    parts = sorted(parts_of(large_parts(mask) if keep == "large" else mask), key=lambda one: -int(one.sum()))
    return parts if keep == "large" else parts[: 1 if keep == "largest" else keep]


def clip_part(mask: BoolArray, *, points: int = POINTS, rng: np.random.Generator) -> Part:
    """A part with its prompts: its tight box, and points inside it.

    Args:
        mask: (H, W) bool, not empty.
        points: How many; 0 = the box alone.
        rng: What the points are drawn with, uniformly and with replacement.
    """
    box = tight_box(mask)
    assert box is not None
    rows, columns = np.nonzero(mask)
    drawn = rng.integers(len(rows), size=points)
    prompts = Prompts(
        points=np.stack([columns[drawn], rows[drawn]], axis=-1).astype(np.float32),
        point_labels=np.ones(points, np.int64),
        box=box,
    )
    return Part(mask=mask, box=box, prompts=prompts)
