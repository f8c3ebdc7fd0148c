"""Several objects of one image, of which every voxel belongs to one at most. The core under `sam_multi`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sam_infer.click import Segmented
from sam_infer.follow import CARRIED, Decode
from sam_infer.geometry import tight_box
from sam_infer.prompts.multi import Objects
from sam_infer.prompts.request import Clicks
from sam_infer.step import mask_logits
from sam_infer.types import BoolArray, Prompts
from sam_infer.volumes import empty_labelmap


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The answer to clicks on several objects.

    Args:
        labelmap: (I, J, K) uint8, the label's value of each voxel.
        found: What each clicked label's own clicks gave, by value, without its mask; ``labelmap`` has what
            is left of it.
        contested: Slices on which two objects claimed the same voxels.
    """

    labelmap: NDArray[np.uint8]
    found: dict[int, Segmented]
    contested: list[int]


def segment_objects(
    objects: Objects, shape: tuple[int, int, int], *, segment: Callable[[Clicks], Segmented], decode: Decode
) -> Labelled:
    """Segment every clicked object by itself, then let those that claim the same voxels compete for them.

    On a slice where masks overlap, each is decoded once more as it is, with its own clicks and those on its
    rivals as background; a voxel goes to the object of the highest logit. A clicked voxel belongs to what it
    was clicked for. Objects of the label map that was sent and that nobody clicked keep their voxels.

    Args:
        objects: The clicks by label, and the label map that was sent.
        shape: (I, J, K) of the image.
        segment: Answers the clicks of one object.
        decode: Decodes prompts on a slice, all in one call.
    """
    volume = empty_labelmap(shape)
    if objects.existing is not None:
        volume[...] = np.where(np.isin(objects.existing, list(objects.clicks)), 0, objects.existing)
    kept = volume > 0
    found: dict[int, Segmented] = {}
    contested: set[int] = set()
    for value, clicks in objects.clicks.items():
        answer = segment(clicks)
        mask = (answer.labelmap > 0) & ~kept
        both = mask & (volume > 0)
        for k in np.flatnonzero(both.any(axis=(0, 1))).tolist():
            current = volume[:, :, k].T
            masks = {rival: current == rival for rival in np.unique(current[both[:, :, k].T]).tolist()}
            masks[value] = mask[:, :, k].T
            won = _won(k, masks, objects.clicks, decode)
            mask[:, :, k] &= ~both[:, :, k] | (won == value).T
            contested.add(k)
        volume[mask] = value
        found[value] = replace(answer, labelmap=empty_labelmap((0, 0, 0)))
    for value, clicks in objects.clicks.items():
        volume[tuple(clicks.foreground.T)] = value
    volume[tuple(objects.background.T)] = 0
    if objects.slice is not None and objects.existing is not None:
        others = np.arange(shape[2]) != objects.slice
        volume[:, :, others] = objects.existing[:, :, others]
    return Labelled(labelmap=volume, found=found, contested=sorted(contested))


def _won(
    k: int, masks: Mapping[int, BoolArray], clicks: Mapping[int, Clicks], decode: Decode
) -> NDArray[np.int64]:
    """(H, W): the value of the object that each pixel of a slice goes to, of those whose mask holds it."""
    prompts = []
    for value, mask in masks.items():
        own = clicks[value].on_slice(k)
        rivals = np.concatenate([clicks[other].on_slice(k).positive for other in masks if other != value])
        prompts.append(
            Prompts(
                points=np.concatenate([own.points, rivals]),
                point_labels=np.concatenate([own.point_labels, np.zeros(len(rivals), np.int64)]),
                box=tight_box(mask),
                mask_logits=mask_logits(mask, CARRIED),
            )
        )
    logits = [
        np.where(mask, found.logits[found.best], -np.inf)
        for mask, found in zip(masks.values(), decode(k, prompts), strict=True)
    ]
    return np.array(list(masks))[np.argmax(logits, axis=0)]
