"""Masks from boxes alone: every box of an image is an object, and an engine fills it.

Häkkinen et al., Medical Image Segmentation with SAM-generated Annotations, arXiv:2409.20253, prompt SAM with
a box for each object of a slice and take its mask as label. How boxes of several slices and overlaps are
dealt with is this project's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_infer.click import click_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import Region, put_slice, slice_image
from sam_infer.intensity import Window
from sam_infer.prompts.request import Clicks
from sam_infer.types import Prompts
from sam_infer.volumes import Image, empty_labelmap


@dataclass(frozen=True, kw_only=True)
class Boxed:
    """What boxes gave.

    Args:
        labelmap: (I, J, K) uint8.
        slices: The slices that the boxes speak of, ascending.
        scores: Mean predicted IoU by the label's value.
    """

    labelmap: NDArray[np.uint8]
    slices: list[int]
    scores: dict[int, float]


def masks_from_boxes(
    image: Image,
    boxes: Mapping[int, Sequence[Region]],
    *,
    encoder: SliceEncoder,
    window: Window,
) -> Boxed:
    """Fill boxes.

    A box of one slice labels that slice; one of several is followed from its middle slice through all of
    them and bounds the object. Where two objects claim a voxel it goes to the one on whose slice the engine
    is surer of it; of objects that were followed, to the one of the higher predicted IoU.

    Args:
        image: The image.
        boxes: By the label's value, in voxels.
        encoder: The engine behind its caches.
        window: How the image's values become 0..1.

    Returns:
        The label map; slices without a box are 0 there, and say nothing.
    """
    labelmap = empty_labelmap(image.shape)
    scores: dict[int, list[float]] = {}
    flat: dict[int, list[tuple[int, Region]]] = {}
    deep: list[tuple[float, int, NDArray[np.uint8]]] = []
    for value, regions in boxes.items():
        for region in regions:
            if len(region.slices) == 1:
                flat.setdefault(region.slices[0], []).append((value, region))
                continue
            found = click_volume(
                image, _clicks(region), encoder=encoder, window=window, mark=lambda stage: None
            )
            deep.append((found.score, value, found.labelmap))
            scores.setdefault(value, []).append(found.score)
    for _, value, mask in sorted(deep, key=lambda one: one[0]):
        labelmap[mask > 0] = value
    for k, given in flat.items():
        prompts = [Prompts(box=region.box) for _, region in given]
        highest = np.zeros((image.shape[1], image.shape[0]), np.float32)
        answer = slice_image(labelmap, k).copy()
        for (value, _), one in zip(given, encoder.decode(image, k, window, prompts, zoom=None), strict=True):
            logits = one.logits[one.best]
            won = (logits > 0) & (logits > highest)
            answer[won], highest[won] = value, logits[won]
            scores.setdefault(value, []).append(float(one.iou[one.best]))
        put_slice(labelmap, k, answer)
    spoken = {k for regions in boxes.values() for region in regions for k in region.slices}
    return Boxed(
        labelmap=labelmap,
        slices=sorted(spoken),
        scores={value: float(np.mean(found)) for value, found in scores.items()},
    )


def _clicks(region: Region) -> Clicks:
    none = np.zeros((0, 3), np.int64)
    return Clicks(foreground=none, background=none, region=region, slice=None, existing=None)
