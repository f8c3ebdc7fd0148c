"""Corrections: what one click changes on its slice, and how that is carried to the neighbouring slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.geometry import put_slice
from sam_infer.propagate import Decode, Volume, decode_neighbour, mask_logits, touching
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts
from sam_infer.volumes import empty_labelmap

#: How many times its radius an addition is deep at most.
DEPTH = 1.0
#: How much a change may grow from slice to slice.
GROWTH = 1.1


def correct_slice(
    previous: FloatArray, answer: FloatArray, *, point: tuple[int, int], label: int
) -> FloatArray:
    """What of an engine's answer to a corrective click is taken over.

    People click where a mask is most wrong, so a change elsewhere that is larger than the one under the click
    contradicts the click and is not made. This project's own choice, akin to the progressive merge of
    FocalClick (Chen et al., CVPR 2022), which keeps only the change under the click.

    Args:
        previous: (H, W) logits of the mask before the click.
        answer: (H, W) logits that the engine gave when it saw ``previous`` and the click.
        point: (x, y) of the click, pixel indices.
        label: 1 = foreground, 0 = background.

    Returns:
        (H, W) logits. ``answer`` as it is where it does not change the clicked pixel as the click asks.
    """
    before, after = previous > 0, answer > 0
    x, y = point
    asked, other = (after & ~before, before & ~after) if label else (before & ~after, after & ~before)
    if not asked[y, x] or not before.any():
        return answer
    parts, _ = ndimage.label(asked)
    limit = np.count_nonzero(parts == parts[y, x])
    return np.where(_larger(asked, limit) | _larger(other, limit), previous, answer)


def _larger(change: BoolArray, limit: int) -> BoolArray:
    """The connected parts of a mask that have more than ``limit`` pixels."""
    parts, _ = ndimage.label(change)
    large = np.bincount(parts.ravel()) > limit
    large[0] = False
    return np.asarray(large[parts])


def correct_volume(
    existing: BoolArray,
    seeds: Mapping[int, Candidates],
    *,
    decode: Decode,
    clicks: Callable[[int], Prompts],
    thickness: float = 1.0,
) -> Volume:
    """Correct a volume's mask: carry what changed on the clicked slices to their neighbours.

    On each neighbour the mask is taken as it was, with the change of the slice before it put in, and decoded
    with the same clicks; only the part around the change is taken over. It ends where the change grows, or
    nothing changes any more. What is added is also taken to be about as deep as it is wide, and carried no
    further than its radius, since an engine hardly ever drops what it is shown. This project's own choice.

    Args:
        existing: (I, J, K) bool, the mask to correct.
        seeds: Decoded candidates of the clicked slices, by k.
        decode: Decodes prompts on a slice.
        clicks: The user's clicks on a slice.
        thickness: Distance between slices, in pixels of a slice.
    """
    volume = empty_labelmap(existing.shape)  # type: ignore[arg-type]
    volume[...] = existing
    quality: list[float] = []
    stops: dict[int, str] = {}
    for k, seed in seeds.items():
        put_slice(volume, k, seed.mask())
        quality.append(float(seed.iou[seed.best]))
    for k, seed in seeds.items():
        before = existing[:, :, k].T
        changed = seed.mask() ^ before
        reach = existing.shape[2]
        if (changed & before).sum() * 2 <= changed.sum():
            reach = int(DEPTH * _radius(changed) / thickness)
        for step in (1, -1):
            path = range(k + step, k + step * (reach + 1), step)
            stops_at, reason = _carry(volume, path, seed.mask(), changed, seeds, decode, clicks(k), quality)
            stops[stops_at] = reason
    return Volume(mask=volume, iou=float(np.mean(quality)), stops=stops)


def _carry(
    volume: NDArray[np.uint8],
    path: range,
    mask: BoolArray,
    changed: BoolArray,
    seeds: Mapping[int, Candidates],
    decode: Decode,
    clicks: Prompts,
    quality: list[float],
) -> tuple[int, str]:
    """Carry a change along ``path`` into ``volume``; the slice where it ended, and why."""
    for n in path:
        if not 0 <= n < volume.shape[2]:
            return n, "edge"
        if n in seeds:
            return n, "met"
        before = volume[:, :, n].T.astype(bool)
        expected = np.where(changed, mask, before)
        if not expected.any() or not (expected ^ before).any():
            put_slice(volume, n, expected)
            return n, "vanished"
        found = decode_neighbour(
            decode, n, mask=expected, logits=mask_logits(expected), clicks=_inside(clicks, changed)
        )
        near = ndimage.binary_dilation(changed, iterations=2)
        after = np.where(near, found.mask(), before)
        following = touching(after ^ before, changed)
        if following.sum() < 0.2 * changed.sum():
            return n, "unchanged"
        if following.sum() > GROWTH * changed.sum():
            return n, "grew"
        put_slice(volume, n, np.where(following, after, before))
        quality.append(float(found.iou[found.best]))
        changed, mask = following, after
    return path.stop, "deep enough"


def _radius(changed: BoolArray) -> float:
    """Of a disc as large as the largest connected part, in pixels."""
    parts, count = ndimage.label(changed)
    return float(np.sqrt(np.bincount(parts.ravel())[1:].max() / np.pi)) if count else 0.0


def _inside(clicks: Prompts, region: BoolArray) -> Prompts:
    keep = np.array([region[int(y), int(x)] for x, y in clicks.points], bool)
    keep = keep if len(keep) else np.zeros(0, bool)
    return Prompts(points=clicks.points[keep], point_labels=clicks.point_labels[keep])
