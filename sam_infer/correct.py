"""Corrections: what one click changes on its slice, and how that is carried to the neighbouring slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

from sam_infer.geometry import put_slice
from sam_infer.propagate import Decode, Volume, decode_neighbour, mask_logits, touching
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts
from sam_infer.volumes import empty_labelmap


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
    existing: BoolArray, seeds: Mapping[int, Candidates], *, decode: Decode, clicks: Callable[[int], Prompts]
) -> Volume:
    """Correct a volume's mask: carry what changed on the clicked slices to their neighbours.

    On each neighbour the mask is taken as it was, with the change of the slice before it put in, and decoded
    with the same clicks; only the part around the change is taken over. A direction ends where nothing
    changes any more. This project's own choice.

    Args:
        existing: (I, J, K) bool, the mask to correct.
        seeds: Decoded candidates of the clicked slices, by k.
        decode: Decodes prompts on a slice.
        clicks: The user's clicks on a slice.
    """
    volume = empty_labelmap(existing.shape)  # type: ignore[arg-type]
    volume[...] = existing
    quality: list[float] = []
    stops: dict[int, str] = {}
    for k, seed in seeds.items():
        put_slice(volume, k, seed.mask())
        quality.append(float(seed.iou[seed.best]))
    for k, seed in seeds.items():
        start = seed.mask()
        changed_here = start ^ existing[:, :, k].T
        for step in (1, -1):
            changed, mask, last, reason = changed_here, start, k, "edge"
            while changed.any():
                n = last + step
                if not 0 <= n < existing.shape[2]:
                    break
                if n in seeds:
                    reason = "met"
                    break
                before = volume[:, :, n].T.astype(bool)
                expected = np.where(changed, mask, before)
                if not expected.any() or not (expected ^ before).any():
                    put_slice(volume, n, expected)
                    reason = "vanished"
                    break
                carried = _inside(clicks(k), changed)
                found = decode_neighbour(
                    decode, n, mask=expected, logits=mask_logits(expected), clicks=carried
                )
                near = ndimage.binary_dilation(changed, iterations=2)
                after = np.where(near, found.mask(), before)
                following = touching(after ^ before, changed)
                if following.sum() < 0.2 * changed.sum():
                    reason = "unchanged"
                    break
                put_slice(volume, n, np.where(following, after, before))
                quality.append(float(found.iou[found.best]))
                changed, mask, last = following, after, n
            stops[last + step] = reason
    return Volume(mask=volume, iou=float(np.mean(quality)), stops=stops)


def _inside(clicks: Prompts, region: BoolArray) -> Prompts:
    keep = np.array([region[int(y), int(x)] for x, y in clicks.points], bool)
    keep = keep if len(keep) else np.zeros(0, bool)
    return Prompts(points=clicks.points[keep], point_labels=clicks.point_labels[keep])
