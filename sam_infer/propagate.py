"""From slices to volumes: a mask on one slice becomes the prompt of the next, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.geometry import put_slice, tight_box
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts
from sam_infer.volumes import empty_labelmap

Decode = Callable[[int, Sequence[Prompts]], list[Candidates]]
SliceValues = Callable[[int], FloatArray]
_BINS = 32
#: Largest strength of the logits that are carried from slice to slice, and of those that are averaged.
CARRIED, CLIPPED = 3.0, 8.0
#: Pixels by which a box is wider than the neighbour's mask: more makes masks grow from slice to slice.
MARGIN = 0.5


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When an object is taken to have ended. This project's own choice.

    Args:
        min_pixels: A smaller mask ends the object.
        min_overlap: Share of the smaller of two neighbouring masks that the two must share.
        max_growth: A mask this many times larger than its neighbour is a leak.
        min_iou: A lower predicted IoU ends the object.
        min_likeness: Bhattacharyya coefficient, 0 to 1, that the intensities inside must keep with those
            inside the prompted slice's mask.
        slope: How far the outline may move outwards from slice to slice, in slice distances.
        neck: Where the area has fallen below this share of its largest and then grows by half again, the
            object is taken to have ended at the neck and what follows to be a neighbour.
    """

    min_pixels: int = 6
    min_overlap: float = 0.5
    max_growth: float = 2.0
    min_iou: float = 0.35
    min_likeness: float = 0.8
    slope: float = 1.5
    neck: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A propagated mask.

    Args:
        mask: (I, J, K) uint8, 0 or 1, Fortran ordered.
        iou: Mean predicted IoU over the slices of the mask.
        stops: Why each direction ended, by the slice where it did: "edge", "roi", "met", "vanished",
            "no overlap", "grew", "uncertain", "other intensities", "neck".
    """

    mask: NDArray[np.uint8]
    iou: float
    stops: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class _Step:
    k: int
    mask: BoolArray
    logits: FloatArray
    iou: float


def propagate(
    seeds: Mapping[int, Candidates],
    *,
    shape: tuple[int, int, int],
    decode: Decode,
    values: SliceValues,
    clicks: Callable[[int], Prompts],
    thickness: float = 1.0,
    bounds: range | None = None,
    rule: StopRule | None = None,
) -> Volume:
    """Propagate an object from its prompted slices, slice by slice, in both directions.

    Outside the prompted slices each direction runs until the object ends; between two prompted slices the
    two runs meet in the middle.

    Args:
        seeds: Decoded candidates of the prompted slices, by k.
        shape: (I, J, K).
        decode: Decodes prompts on a slice, all in one call.
        values: Windowed slice values, (H, W) or (H, W, 3), 0 to 1.
        clicks: The user's clicks on a slice; a slice that holds only background clicks is no seed, but its
            clicks are heeded on the way.
        thickness: Distance between slices, in pixels of a slice.
        bounds: Slices that may be entered; None = all.
        rule: When to stop.
    """
    rule = rule or StopRule()
    bounds = bounds if bounds is not None else range(shape[2])
    volume = empty_labelmap(shape)
    quality: list[float] = []
    stops: dict[int, str] = {}
    order = sorted(seeds)
    for position, k in enumerate(order):
        seed = _Step(
            k=k,
            mask=seeds[k].mask(),
            logits=seeds[k].logits[seeds[k].best],
            iou=float(seeds[k].iou[seeds[k].best]),
        )
        put_slice(volume, k, seed.mask)
        quality.append(seed.iou)
        upper = (k + order[position + 1]) // 2 if position + 1 < len(order) else None
        lower = (k + order[position - 1]) // 2 + 1 if position else None
        for step, end in ((1, upper), (-1, lower)):
            last = end if end is not None else bounds[-1] if step > 0 else bounds[0]
            path = range(k + step, last + step, step) if (last - k) * step > 0 else range(0)
            walked, reason = _walk(seed, path, decode, values, clicks, max(2.0, rule.slope * thickness), rule)
            if not reason:
                outermost = 0 if step < 0 else shape[2] - 1
                reason = "met" if end is not None else "edge" if last == outermost else "roi"
            for taken in walked:
                put_slice(volume, taken.k, taken.mask)
                quality.append(taken.iou)
            stops[(walked[-1].k if walked else k) + step] = reason
    return Volume(mask=volume, iou=float(np.mean(quality)), stops=stops)


def _walk(
    seed: _Step,
    path: range,
    decode: Decode,
    values: SliceValues,
    clicks: Callable[[int], Prompts],
    reach: float,
    rule: StopRule,
) -> tuple[list[_Step], str]:
    """Follow the object along ``path``; what was taken, and why it ended ("" = the path's end)."""
    taken: list[_Step] = []
    if not seed.mask.any():
        return taken, "vanished"
    reference = _histogram(values(seed.k), seed.mask)
    last = seed
    for k in path:
        found = decode_neighbour(decode, k, mask=last.mask, logits=last.logits, clicks=clicks(k))
        near = ndimage.distance_transform_edt(~last.mask) <= reach
        mask = touching(found.mask() & near, last.mask)
        reason = _ended(mask, last.mask, found, values(k), reference, rule)
        if reason:
            return taken, reason
        last = _Step(k=k, mask=mask, logits=found.logits[found.best], iou=float(found.iou[found.best]))
        taken.append(last)
        neck = _neck([int(step.mask.sum()) for step in (seed, *taken)], rule)
        if neck is not None:
            return taken[:neck], "neck"
    return taken, ""


def _neck(areas: list[int], rule: StopRule) -> int | None:
    """Position of the narrowest mask where the areas have narrowed and grow again; None where they do not."""
    narrowest = int(np.argmin(areas))
    if areas[narrowest] > rule.neck * max(areas[: narrowest + 1]):
        return None
    return narrowest if areas[-1] > 1.5 * areas[narrowest] else None


def mask_logits(mask: BoolArray, value: float = 6.0) -> FloatArray:
    """(H, W) logits of a binary mask: plus ``value`` inside, minus outside."""
    return np.where(mask, np.float32(value), np.float32(-value)).astype(np.float32)


def decode_neighbour(
    decode: Decode, k: int, *, mask: BoolArray, logits: FloatArray, clicks: Prompts
) -> Candidates:
    """Decode a slice from its neighbour's mask: the mean of what its box says and of what its logits say.

    Either alone drifts: boxes fill up from slice to slice, logits keep the shape that they had. The logits
    are weakened so that the image decides.

    Args:
        decode: Decodes prompts on a slice.
        k: The slice.
        mask: (H, W) bool, the neighbour's mask, not empty.
        logits: (H, W) float32, the neighbour's logits.
        clicks: The user's clicks on slice ``k``.

    Returns:
        One candidate.
    """
    box = tight_box(mask)
    assert box is not None
    size = mask.shape
    box = (
        max(0.0, box[0] - MARGIN),
        max(0.0, box[1] - MARGIN),
        min(size[1] - 1.0, box[2] + MARGIN),
        min(size[0] - 1.0, box[3] + MARGIN),
    )
    carried = np.clip(np.where(mask, logits, np.minimum(logits, -1.0)), -CARRIED, CARRIED)
    found = decode(
        k,
        [
            replace(clicks, box=box),
            replace(clicks, mask_logits=carried.astype(np.float32)),
        ],
    )
    best = [c.logits[c.best].clip(-CLIPPED, CLIPPED) for c in found]
    iou = np.mean([[c.iou[c.best]] for c in found], axis=0, dtype=np.float32)
    return Candidates(logits=np.mean(best, axis=0)[None], iou=iou)


def touching(mask: BoolArray, neighbour: BoolArray) -> BoolArray:
    """The components of ``mask`` that touch the neighbouring slice's mask."""
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask if (mask & neighbour).any() else np.zeros_like(mask)
    kept = np.unique(labels[neighbour & mask])
    return np.isin(labels, kept[kept > 0])


def _ended(
    mask: BoolArray,
    neighbour: BoolArray,
    found: Candidates,
    values: FloatArray,
    reference: FloatArray,
    rule: StopRule,
) -> str:
    """Why the object is taken to have ended on this slice; "" where it goes on."""
    area, before = int(mask.sum()), int(neighbour.sum())
    if area < rule.min_pixels:
        return "vanished"
    if float(found.iou[found.best]) < rule.min_iou:
        return "uncertain"
    if area > rule.max_growth * max(before, 4 * rule.min_pixels):
        return "grew"
    if (mask & neighbour).sum() < rule.min_overlap * min(area, before):
        return "no overlap"
    likeness = float(np.sqrt(reference * _histogram(values, mask)).sum())
    return "other intensities" if likeness < rule.min_likeness else ""


def _histogram(values: FloatArray, mask: BoolArray) -> FloatArray:
    """Smoothed, normalised histogram of the windowed grey values inside a mask, (32,) float32."""
    grey = values.mean(axis=-1) if values.ndim == 3 else values
    counts = np.bincount(np.clip(grey[mask] * _BINS, 0, _BINS - 1).astype(int), minlength=_BINS)
    smooth = ndimage.gaussian_filter1d(counts.astype(np.float32), 1.0, mode="nearest")
    return smooth / max(float(smooth.sum()), 1e-6)
