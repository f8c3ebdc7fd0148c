"""Corrections: what one click changes on its slice, and how that is carried to the neighbouring slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

from sam_infer.follow import Decode, decode_neighbour, touching
from sam_infer.propagate import Volume
from sam_infer.step import Step, mask_step
from sam_infer.types import BoolArray, FloatArray, Prompts

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
    seeds: Mapping[int, Step],
    *,
    decode: Decode,
    clicks: Callable[[int], Prompts],
    thickness: float = 1.0,
    bounds: range | None = None,
) -> Volume:
    """Correct a volume's mask: carry what changed on the clicked slices to their neighbours.

    On each neighbour the mask is taken as it was, with the change of the slice before it put in, and decoded
    with the same clicks; only the part around the change is taken over. It ends where the change grows, or
    nothing changes any more. What is added is also taken to be about as deep as it is wide, and carried no
    further than its radius, since an engine hardly ever drops what it is shown. This project's own choice.

    Args:
        existing: (I, J, K) bool, the mask to correct.
        seeds: The object on the clicked slices, by k.
        decode: Decodes prompts on a slice.
        clicks: The user's clicks on a slice.
        thickness: Distance between slices, in pixels of a slice.
        bounds: Slices that may be changed; None = all.

    Returns:
        The slices that were decided anew; the others stay as they are.
    """
    depth = existing.shape[2]
    bounds = bounds if bounds is not None else range(depth)
    carrier = _Carrier(existing=existing, seeds=seeds, decode=decode, bounds=bounds)
    whole = (slice(0, existing.shape[1]), slice(0, existing.shape[0]))
    for k, seed in seeds.items():
        before = existing[:, :, k].T
        changed = seed.mask_on(whole) ^ before
        reach = depth
        if np.count_nonzero(changed & before) * 2 <= np.count_nonzero(changed):
            reach = int(DEPTH * _radius(changed) / thickness)
        for step in (1, -1):
            carrier.carry(seed, changed, range(k + step, k + step * (reach + 1), step), clicks(k))
    return Volume(
        steps=dict(sorted(carrier.steps.items())),
        stops=dict(sorted(carrier.stops.items())),
        walked=sorted(carrier.steps),
        decoded=carrier.decoded,
    )


class _Carrier:
    """Carries changes of slices to their neighbours."""

    def __init__(
        self, *, existing: BoolArray, seeds: Mapping[int, Step], decode: Decode, bounds: range
    ) -> None:
        self.existing = existing
        self.seeds = seeds
        self.decode = decode
        self.bounds = bounds
        self.steps = dict(seeds)
        self.stops: dict[int, str] = {}
        self.decoded = 0

    def carry(self, seed: Step, changed: BoolArray, path: range, clicks: Prompts) -> None:
        """Carry a change along ``path``; ``changed`` is (H, W) on the seed's slice."""
        size = (changed.shape[0], changed.shape[1])
        last = seed
        for n in path:
            if n not in self.bounds:
                self.stops[n] = "roi" if 0 <= n < self.existing.shape[2] else "edge"
                return
            if n in self.seeds:
                self.stops[n] = "met"
                return
            before = self._now(n)
            expected = np.where(changed, last.mask_on((slice(0, size[0]), slice(0, size[1]))), before)
            if not (expected ^ before).any():
                self.stops[n] = "unchanged"
                return
            shown = mask_step(n, expected, iou=last.iou)
            if not expected.any():
                self.steps[n] = shown
                self.stops[n] = "vanished"
                return
            found = decode_neighbour(self.decode, n, last=shown, clicks=_inside(clicks, changed), size=size)
            self.decoded += 1
            near = ndimage.binary_dilation(changed, iterations=2)
            after = np.where(near, found.mask(), before)
            following = touching(after ^ before, changed)
            if np.count_nonzero(following) < 0.2 * np.count_nonzero(changed):
                self.stops[n] = "unchanged"
                return
            if np.count_nonzero(following) > GROWTH * np.count_nonzero(changed):
                self.stops[n] = "grew"
                return
            iou = float(found.iou[found.best])
            self.steps[n] = mask_step(n, np.where(following, after, before), iou=iou)
            changed, last = following, mask_step(n, after, iou=iou)
        self.stops[path.stop] = "deep enough"

    def _now(self, k: int) -> BoolArray:
        """(H, W) bool: the mask on a slice, with what has been carried there."""
        if k in self.steps:
            shape = self.existing.shape
            return self.steps[k].mask_on((slice(0, shape[1]), slice(0, shape[0])))
        return np.asarray(self.existing[:, :, k].T)


def _radius(changed: BoolArray) -> float:
    """Of a disc as large as the largest connected part, in pixels."""
    parts, count = ndimage.label(changed)
    return float(np.sqrt(np.bincount(parts.ravel())[1:].max() / np.pi)) if count else 0.0


def _inside(clicks: Prompts, region: BoolArray) -> Prompts:
    keep = np.array([region[int(y), int(x)] for x, y in clicks.points], bool)
    keep = keep if len(keep) else np.zeros(0, bool)
    return Prompts(points=clicks.points[keep], point_labels=clicks.point_labels[keep])
