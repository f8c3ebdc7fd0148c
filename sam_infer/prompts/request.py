"""Prompts as the viewers and REST clients send them: checked, and turned into voxels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_infer.errors import InputError
from sam_infer.geometry import Region, parse_points, parse_roi, tight_box
from sam_infer.intensity import Window
from sam_infer.prompts.boxes import parse_boxes
from sam_infer.prompts.lasso import parse_lasso
from sam_infer.types import BoolArray, Box, Prompts

#: The least ``window_width`` that a client may ask for, in image units.
MIN_WIDTH = 1e-6
#: Slices of a mask that prompt its object, where it has more.
MASK_SLICES = 12


def parse_window(request: Mapping[str, Any]) -> Window | None:
    """``window_level`` and ``window_width`` in image units; None where neither is sent."""
    sent = {name: request.get(name) for name in ("window_level", "window_width")}
    given = {name: value for name, value in sent.items() if value not in (None, "")}
    if not given:
        return None
    for name, value in sent.items():
        if value in (None, ""):
            raise InputError(name, value, "send window_level and window_width together, in image units")
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise InputError(name, value, "send a number, in image units")
    try:
        level, width = (float(str(value)) for value in sent.values())
    except ValueError:
        raise InputError("window_level, window_width", tuple(sent.values()), "send two numbers") from None
    if width < MIN_WIDTH:
        raise InputError("window_width", width, f"send a width of at least {MIN_WIDTH:g}, in image units")
    return Window(level=level, width=width)


def parse_slice(value: object, shape: tuple[int, int, int], axis: int = 2) -> int | None:
    """``slice``: an index along an axis; None, "" and -1 mean that none is named."""
    depth = shape[axis]
    if value is None or value == "" or (value == -1 and not isinstance(value, bool)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError("slice", value, f"send a slice index from 0 to {depth - 1}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = float("nan")
    if number != number or number != int(number if abs(number) < 2**31 else 0) or not 0 <= number < depth:
        raise InputError("slice", value, f"send a slice index from 0 to {depth - 1}")
    return int(number)


def parse_flag(name: str, value: object, *, default: bool = False) -> bool:
    """A flag: true or false, also as text or as 1 and 0; None, "" and "none" are its default.

    Raises:
        InputError: When it is something else.
    """
    known = {"": default, "none": default, "false": False, "true": True, "0": False, "1": True}
    if not isinstance(value, bool | int | str | None) or str(value).lower() not in known:
        raise InputError(name, value, "send true or false")
    return known[str(value).lower()]


def parse_number(name: str, value: object, default: float, most: float) -> float:
    """A number from 0 to ``most``; None and "" are its default."""
    if value is None or value == "":
        return default
    try:
        number = float(value) if isinstance(value, int | float | str) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if isinstance(value, bool) or not 0 <= number <= most:
        raise InputError(name, value, f"send a number from 0 to {most:g}")
    return number


def parse_names(request: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, int]:
    """The labels that ``labels`` or ``label`` (a name or a list of names) asks for; all where neither does.

    Args:
        request: The request's parameters.
        labels: The project's labels, name to value.

    Raises:
        InputError: When a name is none of the project's labels.
    """
    chosen: set[str] = set()
    for key in ("labels", "label"):
        names = request.get(key) or []
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str) or name not in labels:
                raise InputError(key, name, f"choose from {', '.join(labels)}")
            chosen.add(name)
    return {name: value for name, value in labels.items() if not chosen or name in chosen}


def parse_zoom(value: object) -> bool | None:
    """``zoom``: true, false, or "auto" (also None and ""), which is None."""
    known: dict[object, bool | None] = {"auto": None, "": None, "true": True, "false": False}
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in known:
        raise InputError("zoom", value, 'send true, false or "auto"')
    return known[value.lower()]


def parse_region(roi: object, shape: tuple[int, int, int]) -> Region | None:
    """``roi`` as `sam_infer.geometry.parse_roi` reads it; None, [] and "" mean that there is none."""
    return None if roi is None or roi == "" or roi == [] else parse_roi(roi, shape)


@dataclass(frozen=True, kw_only=True)
class Clicks:
    """The prompts of one object, in voxels.

    Args:
        foreground: (N, 3) int64 voxel indices.
        background: (M, 3) int64 voxel indices.
        region: The ROI, or None.
        slice: The slice named in the request, or None.
        existing: (I, J, K) bool, a mask of the object to correct, or None.
        boxes: Box (x0, y0, x1, y1) of the object in slice pixels, by slice along the axis.
        masks: (H, W) bool, a rough mask of the object, by slice along the axis: a lasso, or a mask to refine.
    """

    foreground: NDArray[np.int64]
    background: NDArray[np.int64]
    region: Region | None
    slice: int | None
    existing: BoolArray | None
    boxes: Mapping[int, Box] = field(default_factory=dict)
    masks: Mapping[int, BoolArray] = field(default_factory=dict)

    @property
    def bounds(self) -> range | None:
        """Slices that a ROI of several slices holds the object in; None where there is no such ROI."""
        region = self.region
        return None if region is None or len(region.slices) == 1 else region.slices

    def slices_with_points(self) -> list[int]:
        """Slice indices k that hold a click, ascending."""
        return sorted({int(p[2]) for p in (*self.foreground, *self.background)})

    def slices_with_prompts(self) -> list[int]:
        """Slice indices k that hold a click, a box or a rough mask, ascending."""
        return sorted({*self.slices_with_points(), *self.boxes, *self.masks})

    def on_slice(self, k: int) -> Prompts:
        """The clicks of slice ``k`` as slice pixels, without box or mask."""
        positive = self.foreground[self.foreground[:, 2] == k][:, :2]
        negative = self.background[self.background[:, 2] == k][:, :2]
        return Prompts(
            points=np.concatenate([positive, negative]).astype(np.float32),
            point_labels=np.array([1] * len(positive) + [0] * len(negative), np.int64),
        )


def parse_clicks(
    request: Mapping[str, Any],
    shape: tuple[int, int, int],
    *,
    existing: BoolArray | None = None,
    axis: int = 2,
) -> Clicks:
    """Read the prompts of one object.

    These are ``foreground``, ``background``, ``roi``, ``boxes``, ``lasso``, ``lasso_background``, ``slice``,
    and ``mask``, what a mask that was sent along is for: "correct" (the default where there is any other
    prompt) keeps it but for what the prompts change; "prompt" (the default where it is alone) refines it.

    Args:
        request: The request's parameters.
        shape: (I, J, K) of the image.
        existing: (I, J, K) bool, the mask that was sent along, or None.
        axis: The voxel axis across whose slices boxes and lassos lie, and along which ``slice`` counts.

    Raises:
        InputError: When a value is malformed, outside the image, or nothing says where the object is.
    """
    lasso = parse_lasso("lasso", request.get("lasso"), shape, axis)
    without = parse_lasso("lasso_background", request.get("lasso_background"), shape, axis)
    rough = {k: mask & ~without.masks.get(k, np.False_) for k, mask in lasso.masks.items()}
    boxes = {k: box for k, mask in rough.items() if (box := tight_box(mask)) is not None}
    points = {name: parse_points(name, request.get(name), shape) for name in ("foreground", "background")}
    clicks = Clicks(
        foreground=points["foreground"],
        background=np.concatenate([points["background"], without.points]),
        region=parse_region(request.get("roi"), shape),
        slice=parse_slice(request.get("slice"), shape, axis),
        existing=existing if existing is not None and existing.any() else None,
        boxes={**boxes, **parse_boxes(request.get("boxes"), shape, axis)},
        masks={k: mask for k, mask in rough.items() if mask.any()},
    )
    alone = clicks.region is None and not clicks.slices_with_prompts()
    use = request.get("mask") or ("prompt" if alone else "correct")
    if use not in ("prompt", "correct"):
        raise InputError(
            "mask", use, 'choose "prompt" (refine the mask) or "correct" (change what is prompted)'
        )
    if use == "prompt" and clicks.existing is not None:
        clicks = _with_mask_as_prompt(clicks, np.swapaxes(clicks.existing, axis, 2))
    if (
        not (len(clicks.foreground) or clicks.region or clicks.boxes or clicks.masks)
        and clicks.existing is None
    ):
        raise InputError(
            "foreground",
            request.get("foreground"),
            "nothing says where the object is; send at least one foreground point, a roi box, boxes, a "
            "lasso, or a mask to correct",
        )
    return clicks


def _with_mask_as_prompt(clicks: Clicks, mask: BoolArray) -> Clicks:
    """The mask on its slices, or on `MASK_SLICES` of them, as a rough mask."""
    slices = spread(np.flatnonzero(mask.any(axis=(0, 1))).tolist(), MASK_SLICES)
    if clicks.slice is not None:
        slices = [clicks.slice] if mask[:, :, clicks.slice].any() else []
    rough = {k: np.ascontiguousarray(mask[:, :, k].T) for k in slices}
    for k, drawn in clicks.masks.items():
        rough[k] = rough[k] | drawn if k in rough else drawn
    return replace(clicks, existing=None, masks=rough)


def spread(slices: list[int], count: int) -> list[int]:
    """Up to ``count`` of ascending slices, the outermost among them, evenly spread."""
    if len(slices) <= count:
        return slices
    return [slices[n] for n in np.unique(np.rint(np.linspace(0, len(slices) - 1, count)).astype(int))]


def choose_slice(clicks: Clicks, shape: tuple[int, int, int]) -> int:
    """The one slice that a 2D request is about.

    It is the slice named in the request, else the slice of the clicks, boxes and lassos, else the ROI's
    middle slice.

    Raises:
        InputError: When the prompts lie on several slices and none is named, or none can be known.
    """
    if shape[2] == 1:
        return 0
    if clicks.slice is not None:
        return clicks.slice
    found = clicks.slices_with_prompts()
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise InputError(
            "slice", None, f"the prompts lie on slices {found}; name one of them, or use a 3D model"
        )
    if clicks.region is not None:
        return (clicks.region.low[2] + clicks.region.high[2]) // 2
    raise InputError("slice", None, f"send the slice index, 0 to {shape[2] - 1}, or a point on it")
