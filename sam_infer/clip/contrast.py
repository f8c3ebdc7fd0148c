"""Whether a saliency map says anything of the text: it is held against the maps for texts of no meaning.

Users of MedCLIP-SAM report that BiomedCLIP with gScoreCAM looks at the same place whatever the text is, so
that any nonsense gives the same box. Such a map prompts an engine as well as a good one, and nobody would
know. So the map for a label's description is compared with those for `NONSENSE` on the same slice, and it is
not believed where most of these look like it, or mark the same region. The texts, both measures and both
limits are this project's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam_infer.types import BoolArray, FloatArray

#: An odd number, so that the median is one of them: no words, words of no meaning, and a sentence about
#: nothing that is ever on a slice.
NONSENSE = (
    "zxq wvk jjp tthg",
    "a florp of quizzled vantic drumblo",
    "the last train leaves at half past nine",
)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """When a map is not believed.

    Args:
        correlation: From this median correlation with the maps of nonsense on, -1 to 1.
        iou: From this median intersection over union of the regions on, 0 to 1.
        texts: The nonsense.
    """

    correlation: float = 0.95
    iou: float = 0.9
    texts: tuple[str, ...] = NONSENSE


@dataclass(frozen=True, kw_only=True)
class Contrasted:
    """How much a map looks like those of nonsense.

    Args:
        correlation: Median Pearson correlation of the maps.
        iou: Median intersection over union of the regions.
        depends: Whether the map depends on the text as much as was asked for.
    """

    correlation: float
    iou: float
    depends: bool


def contrasted(
    saliency: FloatArray,
    region: BoolArray,
    nonsense: Sequence[tuple[FloatArray, BoolArray] | None],
    limits: Contrast,
) -> Contrasted:
    """Compare a map with those for nonsense.

    Args:
        saliency: (H, W) float32, not the same everywhere.
        region: (H, W) bool, what was made of it.
        nonsense: The same for each text of no meaning; None where the map is the same everywhere or
            gives no region, which counts as different as can be.
        limits: When the map is not believed.
    """
    pairs = [(0.0, 0.0) if one is None else _alike((saliency, region), one) for one in nonsense]
    correlation, iou = (float(np.median(column)) for column in zip(*pairs, strict=True))
    depends = correlation < limits.correlation and iou < limits.iou
    return Contrasted(correlation=correlation, iou=iou, depends=depends)


def _alike(a: tuple[FloatArray, BoolArray], b: tuple[FloatArray, BoolArray]) -> tuple[float, float]:
    either = np.count_nonzero(a[1] | b[1])
    iou = np.count_nonzero(a[1] & b[1]) / either if either else 1.0
    return float(np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1]), iou
