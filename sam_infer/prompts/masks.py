"""Prompts from masks: a network's answer is cleaned, and becomes a box and seeds for a promptable engine.

The rules are those of Keuth et al., SAM Carries the Burden, arXiv:2411.12602, as their code runs them: of
each class the one component of the highest mean probability, its tight box, the rounded centroid of the
pixels that belong to no other class as positive seed, and the positive seeds of all other classes as negative
ones. The paper describes a flat dilation with a square of 8 pixels before the box is drawn; the code that
made its results does not apply it, so it is off unless asked for. What this project adds is marked where it
stands: seeds inside the object, volumes, and that parts hang together over corners.

Slice pixels are xy (x = column, y = row), voxels are ijk; pixel centres lie at integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.geometry import Region, innermost, largest_component, tight_box
from sam_infer.types import BoolArray, Box, FloatArray
from sam_infer.volumes import empty_labelmap

#: "centroid": the rounded mean coordinate, which may lie beside a bent object, as published. "interior": the
#: maximum of the distance transform, which never does (this project's own choice).
Seed = Literal["centroid", "interior"]
#: "best": of each label one component, as published: a label is one object. "parts": all but the small ones,
#: each an object of its own, such as two kidneys or two lungs under one name (this project's own choice).
Keep = Literal["best", "parts"]
#: Of the largest part's size, what another must have at least to be one.
PART_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class MaskPrompt:
    """The prompts that a mask gives on one slice.

    Args:
        box: (x0, y0, x1, y1) in slice pixels, tight, the outermost pixels included.
        positive: (x, y) in slice pixels; None where no pixel of the mask is its own alone.
        negatives: (Q, 2) float32, xy in slice pixels: the positive seeds of the slice's other masks.
    """

    box: Box
    positive: tuple[float, float] | None
    negatives: FloatArray


@dataclass(frozen=True, kw_only=True)
class VolumePrompt:
    """The prompts that a mask gives in a volume.

    Args:
        region: The smallest box of voxels around it.
        positive: (i, j, k), a voxel.
        negatives: (Q, 3) int64, voxels: the positive seeds of the volume's other labels.
    """

    region: Region
    positive: tuple[int, int, int]
    negatives: NDArray[np.int64]


def best_component(mask: BoolArray, probability: NDArray | None = None) -> BoolArray:
    """The one part of a mask that hangs together, over corners too, and that its maker was surest of.

    Args:
        mask: Bool, of two or three dimensions.
        probability: The same shape, any scale; None = hard masks.

    Returns:
        The component of the highest mean probability, the largest one where there are no probabilities; the
        first in array order wins a tie. An empty mask stays empty.
    """
    if probability is None:
        return largest_component(mask)
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    inside = parts[mask]
    means = np.bincount(inside, probability[mask], count + 1)[1:] / np.bincount(inside)[1:]
    best: BoolArray = parts == 1 + int(means.argmax())
    return best


def parts_of(mask: BoolArray) -> Iterator[BoolArray]:
    """The parts of a mask that hang together, over corners too, in array order, each of its shape."""
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    for value in range(1, count + 1):
        yield parts == value


def large_parts(mask: BoolArray) -> BoolArray:
    """A mask without the parts that are smaller than `PART_SHARE` of the largest one."""
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    large: BoolArray = (sizes >= PART_SHARE * sizes.max())[parts] & mask
    return large


def kept(mask: BoolArray, probability: NDArray | None, keep: Keep) -> BoolArray:
    """What is left of a mask: `best_component` or `large_parts`."""
    return best_component(mask, probability) if keep == "best" else large_parts(mask)


def cleaned(
    probabilities: FloatArray, *, threshold: float = 0.5, dilation: int = 0, keep: Keep = "best"
) -> BoolArray:
    """Clean the probability maps of classes that may overlap.

    Args:
        probabilities: (C, H, W) or (C, I, J, K), 0 to 1, without background.
        threshold: A pixel belongs to a class where its probability is above this.
        dilation: Width in pixels of the square (or cube) by which each mask is widened; 0 = it is not.
        keep: Which components of a class.

    Returns:
        The same shape, bool.
    """
    masks = [kept(one > threshold, one, keep) for one in probabilities]
    return np.stack([dilated(mask, dilation) for mask in masks]) if masks else probabilities > threshold


def cleaned_labelmap(
    labelmap: NDArray[np.uint8], certainty: NDArray | None = None, *, keep: Keep = "best"
) -> NDArray[np.uint8]:
    """Clean a label map, over slices too (this project's own choice).

    Args:
        labelmap: (I, J, K) uint8.
        certainty: (I, J, K), the probability of each voxel's own label on any scale; None = the largest
            component of each label is the best.
        keep: Which components of a label.

    Returns:
        (I, J, K) uint8, in Fortran order.
    """
    i, j, k = labelmap.shape
    out = empty_labelmap((i, j, k))
    for value, box in enumerate(ndimage.find_objects(labelmap), start=1):
        if box is not None:
            sure = None if certainty is None else certainty[box]
            out[box][kept(labelmap[box] == value, sure, keep)] = value
    return out


def dilated(mask: BoolArray, width: int) -> BoolArray:
    """A mask widened by a flat square or cube.

    Args:
        mask: Bool, of two or three dimensions.
        width: Side of the square in pixels: it grows by about half of this on each side, an even one by a
            pixel more towards the first row and column. 0 and 1 leave the mask as it is.
    """
    if width < 0:
        raise ValueError(f"dilation = {width}: must be 0 or more, in pixels")
    if width < 2 or not mask.any():
        return mask
    for axis in range(mask.ndim):
        line = np.ones([width if n == axis else 1 for n in range(mask.ndim)], bool)
        mask = ndimage.binary_dilation(mask, line)
    return mask


def mask_prompts(masks: Mapping[int, BoolArray], *, seed: Seed = "centroid") -> dict[int, MaskPrompt]:
    """The prompts of the masks of one slice.

    Args:
        masks: (H, W) bool by the label's value; they may overlap.
        seed: Where positive seeds lie.

    Returns:
        By value, in the order of ``masks``; without those that are empty.
    """
    present = {value: mask for value, mask in masks.items() if mask.any()}
    if not present:
        return {}
    alone = np.sum(list(present.values()), axis=0, dtype=np.uint16) == 1
    seeds = {value: _seed(mask & alone, seed) for value, mask in present.items()}
    points = {value: (float(at[1]), float(at[0])) for value, at in seeds.items() if at is not None}
    found = {}
    for value, mask in present.items():
        box = tight_box(mask)
        assert box is not None
        others = [point for other, point in points.items() if other != value]
        found[value] = MaskPrompt(
            box=box,
            positive=points.get(value),
            negatives=np.array(others, np.float32).reshape(-1, 2),
        )
    return found


def volume_prompts(labelmap: NDArray[np.uint8], *, seed: Seed = "centroid") -> dict[int, VolumePrompt]:
    """The prompts of the labels of a volume: `mask_prompts` in three dimensions.

    Args:
        labelmap: (I, J, K) uint8.
        seed: Where positive seeds lie; distances are in voxels.

    Returns:
        By value, ascending; without those that are empty.
    """
    boxes = dict(enumerate(ndimage.find_objects(labelmap), start=1))
    seeds: dict[int, tuple[int, int, int]] = {}
    for value, box in boxes.items():
        at = None if box is None else _seed(labelmap[box] == value, seed)
        if at is not None:
            i, j, k = (n + part.start for n, part in zip(at, box, strict=True))
            seeds[value] = (i, j, k)
    found = {}
    for value, positive in seeds.items():
        others = [voxel for other, voxel in seeds.items() if other != value]
        i, j, k = boxes[value]
        found[value] = VolumePrompt(
            region=Region(low=(i.start, j.start, k.start), high=(i.stop - 1, j.stop - 1, k.stop - 1)),
            positive=positive,
            negatives=np.array(others, np.int64).reshape(-1, 3),
        )
    return found


def _seed(mask: BoolArray, seed: Seed) -> tuple[int, ...] | None:
    """Index of a mask's seed; None where it is empty."""
    where = np.nonzero(mask)
    if not len(where[0]):
        return None
    if seed == "interior":
        return innermost(mask)
    return tuple(int(np.rint(axis.mean())) for axis in where)
