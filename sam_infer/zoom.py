"""Zoom: a small object is encoded by itself, at full resolution, instead of with the whole slice.

An engine that resamples every slice to one side sees little of a small object; a crop around it is seen
larger. What a box or a previous mask covers says where to look, so a crop follows from the prompts alone, and
nothing is remembered of who asked. Crops come in steps of size and place, so that a mask that changes a
little from click to click, or from slice to slice, is answered from the same crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sam_infer.engines.base import Encoding
from sam_infer.geometry import tight_box, union_box
from sam_infer.types import BoolArray, Box, Candidates, Crop, FloatArray, Prompts

#: Times that a crop is enlarged at most: more pixels of the same blur tell nothing.
MOST_ENLARGED = 8.0
#: Times that a crop must be seen larger than the whole slice to be worth its encoding.
GAIN = 4 / 3
#: Logits beyond a crop.
OUTSIDE = -16.0
_STEPS_PER_DOUBLING = 4
_PLACES = 8


def choose_crop(prompts: Sequence[Prompts], size: tuple[int, int], encoding: Encoding) -> Crop | None:
    """The part of a slice that prompts are about.

    It lies around their boxes and previous masks; foreground clicks beyond make it larger. Background clicks
    never do: beyond a crop all is background.

    Args:
        prompts: At least one entry.
        size: (H, W) of the slice.
        encoding: How the engine sees what it encodes.

    Returns:
        The crop; None where clicks alone do not tell an object's size, or the whole slice is seen nearly as
        large. On a slice larger than its side, where the engine would lose detail, any gain counts.
    """
    shown = [box for prompt in prompts for box in _shown(prompt)]
    if not shown:
        return None
    crop = _around(union_box(shown), size, encoding)
    clicks = np.concatenate([prompt.positive for prompt in prompts])
    if crop is not None and not holds(crop, clicks):
        crop = _around(union_box([*shown, *((x, y, x, y) for x, y in clicks.tolist())]), size, encoding)
    return crop


def _shown(prompt: Prompts) -> list[Box]:
    mask = None if prompt.mask_logits is None else tight_box(prompt.mask_logits > 0)
    return [box for box in (prompt.box, mask) if box is not None]


def _around(box: Box, size: tuple[int, int], encoding: Encoding) -> Crop | None:
    """The crop around a box, its side and place rounded to steps; None where it gains nothing."""
    longest, side = max(size), encoding.side
    wanted = max(encoding.margin * (max(box[2] - box[0], box[3] - box[1]) + 1), side / MOST_ENLARGED)
    steps = math.ceil(_STEPS_PER_DOUBLING * math.log2(wanted))
    length = math.ceil(2 ** (steps / _STEPS_PER_DOUBLING))
    if length * (GAIN if longest <= side else 1) > longest:
        return None
    x0, x1 = _placed((box[0] + box[2]) / 2, length, size[1])
    y0, y1 = _placed((box[1] + box[3]) / 2, length, size[0])
    return (x0, y0, x1, y1)


def _placed(centre: float, length: int, room: int) -> tuple[int, int]:
    """First and last pixel along one axis, inside 0 to ``room`` - 1."""
    length, step = min(length, room), max(1, length // _PLACES)
    low = round((centre + 0.5 - length / 2) / step) * step
    low = min(max(low, 0), room - length)
    return low, low + length - 1


def holds(crop: Crop, points: FloatArray) -> bool:
    """Whether all of (N, 2) points, xy in slice pixels, lie in a crop."""
    low, high = np.array(crop[:2]), np.array(crop[2:])
    return bool(((points >= low) & (points <= high)).all())


def crop_prompts(prompts: Prompts, crop: Crop) -> Prompts:
    """Prompts of a slice as prompts of its crop; background clicks beyond the crop are left out.

    Args:
        prompts: Their foreground clicks lie in the crop.
        crop: The crop.
    """
    x0, y0, x1, y1 = crop
    inside = np.array([holds(crop, point) for point in prompts.points], bool)
    box = prompts.box
    if box is not None:
        box = (max(box[0], x0) - x0, max(box[1], y0) - y0, min(box[2], x1) - x0, min(box[3], y1) - y0)
    return replace(
        prompts,
        points=prompts.points[inside] - np.array([x0, y0], np.float32),
        point_labels=prompts.point_labels[inside],
        box=box,
        mask_logits=_cut(prompts.mask_logits, crop),
        attention=_cut(prompts.attention, crop),
    )


def _cut(values: FloatArray | None, crop: Crop) -> FloatArray | None:
    """(H, W) values of a slice as those of its crop."""
    x0, y0, x1, y1 = crop
    return None if values is None else np.ascontiguousarray(values[y0 : y1 + 1, x0 : x1 + 1])


def paste(found: Candidates, crop: Crop, size: tuple[int, int]) -> Candidates:
    """The candidates of a crop, (M, h, w), as candidates of its slice of ``size`` (H, W)."""
    x0, y0, x1, y1 = crop
    logits = np.full((len(found.logits), *size), OUTSIDE, np.float32)
    logits[:, y0 : y1 + 1, x0 : x1 + 1] = found.logits
    return Candidates(logits=logits, iou=found.iou, crop=crop)


def leaves(mask: BoolArray, crop: Crop) -> bool:
    """Whether an (H, W) mask of a slice reaches an edge of a crop that is no edge of the slice."""
    x0, y0, x1, y1 = crop
    height, width = mask.shape
    rows, columns = slice(y0, y1 + 1), slice(x0, x1 + 1)
    edges = [mask[rows, x0] if x0 else None, mask[rows, x1] if x1 < width - 1 else None]
    edges += [mask[y0, columns] if y0 else None, mask[y1, columns] if y1 < height - 1 else None]
    return any(edge is not None and bool(edge.any()) for edge in edges)
