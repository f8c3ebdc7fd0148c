"""Clicks on several objects, as viewers send them to models of type deepedit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_infer.errors import InputError
from sam_infer.geometry import parse_points
from sam_infer.prompts.request import Clicks, parse_region, parse_slice

#: The name under which viewers send points that belong to no object.
BACKGROUND = "background"
_NONE = np.zeros((0, 3), np.int64)


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The prompts of several objects.

    Args:
        clicks: The clicks of each prompted label, by its value, ascending.
        background: (M, 3) int64 voxels that belong to no object; among the clicks of every label that they
            can be about, too.
        existing: (I, J, K) integers, the label map to correct, by label value; None where none was sent.
        slice: The one slice that is asked for, or None; clicks on other slices are left out.
    """

    clicks: dict[int, Clicks]
    background: NDArray[np.int64]
    existing: NDArray[np.integer] | None
    slice: int | None


def parse_objects(
    request: Mapping[str, Any],
    shape: tuple[int, int, int],
    *,
    labels: Mapping[str, int],
    existing: NDArray[np.integer] | None = None,
) -> Objects:
    """Read the points under every label's name, ``background``, ``roi`` of ``label``, and ``slice``.

    The nearest point of another label on the same slice is a background point of a new object. That raised
    the mean Dice on CT and MR slices by about .01 after one and after two clicks a label; all points of
    other labels lowered it. An object that was sent along takes those that lie on it, and so gives way.

    Args:
        request: The request's parameters.
        shape: (I, J, K) of the image.
        labels: The project's label name -> value.
        existing: (I, J, K) integers, the label map that was sent along, or None.

    Raises:
        InputError: When a value is malformed or outside the image, a voxel was clicked for two labels, or
            nothing says where an object is.
    """
    chosen = parse_slice(request.get("slice"), shape)
    background = _on(chosen, parse_points(BACKGROUND, request.get(BACKGROUND), shape))
    region = parse_region(request.get("roi"), shape)
    current = request.get("label")
    if current == BACKGROUND:
        region = None
    if region is not None and (not isinstance(current, str) or current not in labels):
        raise InputError("label", current, f"a roi needs the label that it is for, of {', '.join(labels)}")
    for value in np.unique(existing).tolist() if existing is not None else []:
        if value and value not in labels.values():
            known = ", ".join(f"{value} = {name}" for name, value in labels.items())
            raise InputError("label", value, f"not a value of this project's labels: {known}", status=422)
    foreground = {
        value: _on(chosen, parse_points(name, request.get(name), shape)) for name, value in labels.items()
    }
    clicks = {}
    for name, value in labels.items():
        box = region if name == current else None
        if box is not None and chosen is not None and chosen not in box.slices:
            box = None
        mask = existing == value if existing is not None else None
        mask = mask if mask is not None and mask.any() else None
        own = foreground[value]
        others = np.concatenate([points for other, points in foreground.items() if other != value] + [_NONE])
        if mask is None:
            negative = np.concatenate([background, _nearest(others, own)])
        else:
            negative = np.concatenate([background, others])
            negative = negative[mask[tuple(negative.T)]]
        if len(own) or box is not None or (mask is not None and len(negative)):
            clicks[value] = Clicks(
                foreground=own, background=negative, region=box, slice=chosen, existing=mask
            )
    if not clicks:
        raise InputError(
            "label",
            current,
            "nothing says where an object is; send a roi with label, or points under the name of a label "
            f"({', '.join(labels)})",
        )
    _check_disjoint(foreground, background, {value: name for name, value in labels.items()})
    return Objects(clicks=clicks, background=background, existing=existing, slice=chosen)


def _on(chosen: int | None, points: NDArray[np.int64]) -> NDArray[np.int64]:
    return points if chosen is None else points[points[:, 2] == chosen]


def _nearest(others: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nearest of other labels' points to a label's own ones, of those on a slice with one of these."""
    others = others[np.isin(others[:, 2], own[:, 2])]
    if not len(others):
        return others
    distance = ((others[:, None, :2] - own[None, :, :2]) ** 2).sum(-1)
    apart = np.where(others[:, None, 2] == own[None, :, 2], distance, np.iinfo(np.int64).max)
    return others[[int(apart.min(axis=1).argmin())]]


def _check_disjoint(
    foreground: Mapping[int, NDArray[np.int64]], background: NDArray[np.int64], names: Mapping[int, str]
) -> None:
    owner = {tuple(point): BACKGROUND for point in background.tolist()}
    for value, points in foreground.items():
        for point in points.tolist():
            if owner.setdefault(tuple(point), names[value]) != names[value]:
                raise InputError(
                    names[value],
                    point,
                    f"the same voxel is a point of {owner[tuple(point)]}; a voxel belongs to one of them",
                )
