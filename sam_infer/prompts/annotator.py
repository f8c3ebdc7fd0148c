"""A simulated annotator: every way to prompt for a known mask, with what it costs in clicks.

Häkkinen et al., Medical Image Segmentation with SAM-generated Annotations, arXiv:2409.20253, compare
points, points with negatives and boxes as annotations; where and how many they place is not known. The
strategies here are those that are usual with SAM on medical images; all numbers (margins, distances, counts)
are this project's own choice but where SAM-Med2D is named. Each part of a mask that hangs together, over
corners too, is prompted by itself, but for ``box_class``; the masks that an engine gives to all parts are
united.

Coordinates are slice pixels xy (x = column, y = row), pixel centres at integers. What a strategy draws at
random depends on the generator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage

from sam_infer.geometry import innermost, tight_box, widen_box
from sam_infer.prompts.masks import parts_of
from sam_infer.prompts.simulated import jitter_box, shift_box
from sam_infer.step import window_around
from sam_infer.types import BoolArray, Box, FloatArray, Prompts

#: Clicks that a box takes: two of its corners.
BOX_CLICKS = 2
#: Least and greatest distance of a negative point from the object, in pixels.
RING = (5.0, 15.0)

Give = Callable[[BoolArray, np.random.Generator], list[Prompts]]
#: Points of one part: (part, mask that it is of, generator) -> (N, 2) float32 xy.
_Points = Callable[[BoolArray, BoolArray, np.random.Generator], FloatArray]
#: A part's tight box as it is drawn: (box, generator, (H, W)) -> box.
_Drawn = Callable[[Box, np.random.Generator, tuple[int, int]], Box]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to prompt.

    Args:
        name: Its name in `STRATEGIES`.
        clicks: What each prompt costs; a part has fewer where there is no place for its negative points.
        give: (H, W) bool mask and generator -> the prompts, one for each part; none for an empty mask.
    """

    name: str
    clicks: int
    give: Give


def box_strategy(name: str, drawn: _Drawn | None = None, *, whole: bool = False) -> Strategy:
    """A box around each part.

    Args:
        name: Its name.
        drawn: How the tight box is drawn; None = as it is.
        whole: One box around all of the mask.
    """

    def give(mask: BoolArray, rng: np.random.Generator) -> list[Prompts]:
        some = [mask] if whole and mask.any() else [] if whole else parts_of(mask)
        boxes = [_box(part) for part in some]
        height, width = mask.shape
        return [Prompts(box=drawn(box, rng, (height, width)) if drawn else box) for box in boxes]

    return Strategy(name=name, clicks=BOX_CLICKS, give=give)


def point_strategy(
    name: str, positive: _Points | None, *, count: int = 0, negatives: int = 0, box: bool = False
) -> Strategy:
    """Points in each part and around it, with its tight box or without.

    Args:
        name: Its name.
        positive: The points inside; None = there are none.
        count: How many these are.
        negatives: Number of points in a `RING` around the part; fewer where the ring lies outside the image.
        box: With the tight box.
    """

    def give(mask: BoolArray, rng: np.random.Generator) -> list[Prompts]:
        found = []
        for part in parts_of(mask):
            inside = _NONE if positive is None else positive(part, mask, rng)
            outside = ring_points(part, mask, rng, count=negatives)
            found.append(
                Prompts(
                    points=np.concatenate([inside, outside]),
                    point_labels=np.array([1] * len(inside) + [0] * len(outside), np.int64),
                    box=_box(part) if box else None,
                )
            )
        return found

    return Strategy(name=name, clicks=count + negatives + BOX_CLICKS * box, give=give)


def centre_point(part: BoolArray, mask: BoolArray, rng: np.random.Generator) -> FloatArray:
    """(1, 2) xy: the pixel of a part that is farthest from its outside."""
    row, column = innermost(part)
    return np.array([[column, row]], np.float32)


def random_points(part: BoolArray, mask: BoolArray, rng: np.random.Generator, *, count: int) -> FloatArray:
    """(count, 2) xy: pixels of a part, each as likely; some more than once where it has too few."""
    return _chosen(part, rng, count)


def ring_points(part: BoolArray, mask: BoolArray, rng: np.random.Generator, *, count: int) -> FloatArray:
    """Pixels around a part, inside the image and away from the whole mask.

    Args:
        part: (H, W) bool.
        mask: (H, W) bool, which the part is of: no point lies nearer to it than the `RING`.
        rng: Source of the choice.
        count: How many.

    Returns:
        (count, 2) float32 xy, some more than once where the ring has too few pixels; (0, 2) where it has
        none, as around an object that fills the image.
    """
    if not count:
        return _NONE
    near, far = RING
    window = window_around(tight_box(part), near + far, part.shape)
    around = ndimage.distance_transform_edt(~part[window]) <= far
    ring = around & (ndimage.distance_transform_edt(~mask[window]) >= near)
    corner = np.array([window[1].start, window[0].start], np.float32)
    return _chosen(ring, rng, count) + corner if ring.any() else _NONE


_NONE = np.zeros((0, 2), np.float32)


def _chosen(mask: BoolArray, rng: np.random.Generator, count: int) -> FloatArray:
    rows, columns = np.nonzero(mask)
    chosen = rng.choice(len(rows), count, replace=len(rows) < count)
    return np.stack([columns[chosen], rows[chosen]], axis=1).astype(np.float32)


def _box(part: BoolArray) -> Box:
    box = tight_box(part)
    assert box is not None
    return box


def _margin(box: Box, rng: np.random.Generator, size: tuple[int, int], *, pixels: float) -> Box:
    return widen_box(box, (pixels,) * 4, size)


def _outward(box: Box, rng: np.random.Generator, size: tuple[int, int], *, pixels: float) -> Box:
    left, top, right, bottom = rng.uniform(0.0, pixels, 4).tolist()
    return widen_box(box, (left, top, right, bottom), size)


def _by_share(box: Box, rng: np.random.Generator, size: tuple[int, int], *, fraction: float) -> Box:
    return jitter_box(box, fraction, rng, size)


#: Every strategy by its name.
STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        box_strategy("box_component"),
        box_strategy("box_class", whole=True),
        box_strategy("box_margin5", partial(_margin, pixels=5.0)),
        *(box_strategy(f"box_jitter{n}", partial(_outward, pixels=float(n))) for n in (2, 5, 10, 20)),
        box_strategy("box_jitter_10pct", partial(_by_share, fraction=0.1)),
        box_strategy("box_shift", shift_box),
        point_strategy("point", centre_point, count=1),
        *(point_strategy(f"points{n}", partial(random_points, count=n), count=n) for n in (3, 5, 10)),
        point_strategy("points3_negatives3", partial(random_points, count=3), count=3, negatives=3),
        point_strategy("box_point", centre_point, count=1, box=True),
        point_strategy("box_negatives3", None, negatives=3, box=True),
    )
}
