"""From one slice to the next: a mask becomes the prompt of its neighbour, until the object ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from sam_infer.geometry import widen_box
from sam_infer.step import Step, blend, clipped, overlap, window_around
from sam_infer.stoprule import StopRule, histogram
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts

Decode = Callable[[int, Sequence[Prompts]], list[Candidates]]
SliceValues = Callable[[int], FloatArray]
#: Looks at the slices of a path one after another, from a step on, by an engine's own memory of the object.
Track = Callable[[range, Step], Iterator[tuple[int, Candidates]]]
#: Largest strength of the logits that are carried from slice to slice: weak, so that the image decides.
CARRIED = 4.0
#: Pixels by which a box is wider than the neighbour's mask on each side: with less, masks shrink from slice
#: to slice; with more, they grow.
MARGIN = 1.0
#: A mask that shares this much (IoU) with what is known of its slice has come back to it.
SAME = 0.95
#: Slices are left to interpolation only between masks that share this much (IoU).
CLOSE = 0.75


@dataclass(frozen=True, kw_only=True)
class Follower:
    """What is needed to follow an object from slice to slice.

    Args:
        size: (H, W) of a slice.
        decode: Decodes prompts on a slice, all in one call.
        values: Windowed slice values, (H, W) or (H, W, 3), 0 to 1.
        clicks: The user's clicks on a slice, heeded when its turn comes.
        thickness: Distance between slices, in pixels of a slice.
        rule: When the object has ended.
        stride: Slices are decoded up to this share of the object's radius apart and those between are
            interpolated, as contours are drawn by hand; 0 = each is decoded.
        farthest: Slices that are decoded lie at most this many slices apart.
        track: Looks at each slice in place of decoding it from its neighbour; None = there is no memory.
    """

    size: tuple[int, int]
    decode: Decode
    values: SliceValues
    clicks: Callable[[int], Prompts]
    thickness: float
    rule: StopRule
    stride: float = 0.1
    farthest: int = 3
    track: Track | None = None

    def follow(self, seed: Step, path: range, known: Mapping[int, Step]) -> Followed:
        """Follow the object along ``path``, until it ends or is again what is known.

        Args:
            seed: Where to start.
            path: Slice indices, the first one next to the seed.
            known: What was found on slices of the path before; where a mask is the same (`SAME`), the walk
                ends.
        """
        steps: list[Step] = []
        decoded = 0
        if not seed.area:
            return Followed(steps=steps, reason="vanished", decoded=decoded)
        reference = histogram(self.values(seed.k)[seed.window], seed.mask)
        areas = [seed.area]
        tracked = None if self.track is None else self.track(path, seed)
        last, position, careful = seed, 0, 0
        while position < len(path):
            length = 1 if careful or tracked is not None else self._length(last, path[position:])
            k = path[position + length - 1]
            found = self._found(last, k) if tracked is None else next(tracked)[1]
            step, reason = self._advance(last, k, found, length, reference)
            decoded += 1
            if length > 1 and (reason or overlap(step, last) < CLOSE):
                careful = length  # the object ends or changes within these slices: decode each of them
                continue
            if reason:
                return Followed(steps=steps, reason=reason, decoded=decoded)
            careful = max(0, careful - 1)
            between = [blend(last, step, n / length, path[position + n - 1]) for n in range(1, length)]
            taken = [*between, step]
            steps += taken
            areas += [one.area for one in taken]
            neck = self.rule.narrowest(areas)
            if neck is not None:
                return Followed(steps=steps[:neck], reason="neck", decoded=decoded)
            if k in known and overlap(step, known[k]) >= SAME:
                return Followed(steps=steps, reason="met", decoded=decoded)
            last, position = step, position + length
        return Followed(steps=steps, reason="", decoded=decoded)

    def _length(self, last: Step, path: range) -> int:
        """How many slices to go at once: few in radii, and not past a clicked slice."""
        radius = float(np.sqrt(last.area / np.pi))
        length = int(np.clip(self.stride * radius / max(self.thickness, 1e-6), 1, self.farthest))
        length = min(length, len(path))
        clicked = (n for n in range(1, length) if len(self.clicks(path[n - 1]).points))
        return next(clicked, length)

    def _found(self, last: Step, k: int) -> Candidates:
        return decode_neighbour(self.decode, k, last=last, clicks=self.clicks(k), size=self.size)

    def _advance(
        self, last: Step, k: int, found: Candidates, length: int, reference: FloatArray
    ) -> tuple[Step, str]:
        """The object on slice ``k``, and why it has ended there ("" = it has not)."""
        reach = self.rule.reach(self.thickness * length)
        window = window_around(last.box, reach + 1.0, self.size)
        before = last.mask_on(window)
        logits = clipped(found.logits[found.best][window])
        near = ndimage.distance_transform_edt(~before) <= reach
        mask = touching((logits > 0) & near, before)
        iou = float(found.iou[found.best])
        reason = self.rule.ended(mask, before, iou=iou, values=self.values(k)[window], reference=reference)
        return Step(k=k, window=window, mask=mask, logits=logits, iou=iou), reason


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What one walk found.

    Args:
        steps: The object on the slices of the path, in their order.
        reason: Why it ended: "met", or as `StopRule.ended` tells, or "neck"; "" = the path's end.
        decoded: How many slices were decoded.
    """

    steps: list[Step]
    reason: str
    decoded: int


def decode_neighbour(
    decode: Decode, k: int, *, last: Step, clicks: Prompts, size: tuple[int, int]
) -> Candidates:
    """Decode a slice from its neighbour's mask: its box and its weakened logits in one prompt.

    Args:
        decode: Decodes prompts on a slice.
        k: The slice.
        last: The neighbour, not empty.
        clicks: The user's clicks on slice ``k``.
        size: (H, W) of a slice.
    """
    assert last.box is not None
    box = widen_box(last.box, (MARGIN,) * 4, size)
    carried = np.full(size, -CARRIED, np.float32)
    carried[last.window] = np.clip(last.logits_on(last.window), -CARRIED, CARRIED)
    return decode(k, [replace(clicks, box=box, mask_logits=carried)])[0]


def touching(mask: BoolArray, neighbour: BoolArray) -> BoolArray:
    """The components of ``mask`` that touch the neighbouring slice's mask."""
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask if (mask & neighbour).any() else np.zeros_like(mask)
    kept = np.zeros(count + 1, bool)
    kept[labels[neighbour & mask]] = True
    kept[0] = False
    return np.asarray(kept[labels])
