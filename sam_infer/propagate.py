"""From slices to volumes: an object is followed from its prompted slices in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sam_infer.follow import Follower
from sam_infer.step import Step, blend


@dataclass(frozen=True, kw_only=True)
class Volume:
    """An object through slices, or what a correction changed of it.

    Args:
        steps: The object by slice k.
        stops: Why it ended, by the slice where it did: "edge", "roi", "met", "vanished", "no overlap",
            "grew", "uncertain", "other intensities", "neck", "unchanged", "deep enough".
        walked: Slices that were decided anew, ascending.
        decoded: How many slices were decoded beside the prompted ones.
    """

    steps: Mapping[int, Step]
    stops: Mapping[int, str]
    walked: list[int]
    decoded: int

    @property
    def iou(self) -> float:
        """Mean predicted IoU over the slices."""
        return float(np.mean([step.iou for step in self.steps.values()])) if self.steps else 0.0

    @property
    def nbytes(self) -> int:
        """Memory of the steps in bytes."""
        return sum(step.nbytes for step in self.steps.values())

    def paint(self, labelmap: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Write the object into its slices of an (I, J, K) uint8 label map, in place; 1 = the object."""
        for k, step in self.steps.items():
            labelmap[:, :, k] = 0
            labelmap[step.window[1], step.window[0], k] = step.mask.T
        return labelmap


NOTHING = Volume(steps={}, stops={}, walked=[], decoded=0)


def propagate(
    seeds: Mapping[int, Step],
    *,
    depth: int,
    follower: Follower,
    bounds: range | None = None,
    earlier: Volume = NOTHING,
) -> Volume:
    """Follow an object from its prompted slices, slice by slice, in both directions.

    Beyond the outermost prompted slices a walk runs until the object ends. Between two prompted slices both
    walks cross, unless the second one meets the first, and are blended, each weighing the more the nearer
    its own prompted slice is.

    With an earlier answer only what the seeds change is walked: from each seed that the earlier answer does
    not hold as it is, to the next seed on either side, or until the walk comes back to the earlier answer.

    Args:
        seeds: The object on the prompted slices, by k; of an earlier answer too.
        depth: Number of slices.
        follower: Follows the object.
        bounds: Slices that may be entered; None = all.
        earlier: What was found before these seeds changed.
    """
    bounds = bounds if bounds is not None else range(depth)
    work = _Work(follower=follower, steps=dict(earlier.steps), stops=dict(earlier.stops))
    fresh = [k for k in sorted(seeds) if seeds[k] is not earlier.steps.get(k)]
    order = sorted(seeds)
    for k in fresh:
        work.put([seeds[k]])
    for k in fresh:
        above = next((n for n in order if n > k), None)
        below = next((n for n in reversed(order) if n < k), None)
        for step, other, outermost in ((1, above, bounds[-1]), (-1, below, bounds[0])):
            if other is not None:
                work.cross(seeds[k], range(k + step, other, step), other)
            else:
                edge = "edge" if outermost == (depth - 1 if step > 0 else 0) else "roi"
                work.leave(seeds[k], range(k + step, outermost + step, step), edge)
    return Volume(
        steps=dict(sorted(work.steps.items())),
        stops=dict(sorted(work.stops.items())),
        walked=sorted(work.walked),
        decoded=work.decoded,
    )


@dataclass(kw_only=True)
class _Work:
    """A volume in the making."""

    follower: Follower
    steps: dict[int, Step]
    stops: dict[int, str]
    walked: set[int] = field(default_factory=set)
    decoded: int = 0

    def put(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.steps[step.k] = step
            self.walked.add(step.k)

    def leave(self, seed: Step, path: range, edge: str) -> None:
        """Walk from an outermost seed outwards; ``edge`` tells what the path's end is."""
        walk = self.follower.follow(seed, path, self.steps)
        self.decoded += walk.decoded
        self.put(walk.steps)
        if walk.reason == "met":
            return
        for k in path[len(walk.steps) :]:
            if self.steps.pop(k, None) is not None:
                self.walked.add(k)
        sign = path.step
        self.stops = {k: why for k, why in self.stops.items() if (k - seed.k) * sign <= 0}
        self.stops[seed.k + sign * (len(walk.steps) + 1)] = walk.reason or edge

    def cross(self, seed: Step, path: range, other: int) -> None:
        """Walk from a seed towards the next one."""
        walk = self.follower.follow(seed, path, self.steps)
        self.decoded += walk.decoded
        distance = abs(other - seed.k)
        for step in walk.steps:
            held = self.steps.get(step.k)
            share = abs(step.k - seed.k) / distance
            self.put([step if held is None else blend(step, held, share, step.k)])
        self.stops = {k: why for k, why in self.stops.items() if k not in path or k not in self.steps}
        if path:
            self.stops[path[min(len(walk.steps), len(path) - 1)]] = walk.reason or "met"
