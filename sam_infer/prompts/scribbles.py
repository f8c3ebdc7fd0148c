"""Scribbles as 3D Slicer and REST clients send them: a label map with painted strokes, and a ROI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.errors import InputError
from sam_infer.geometry import Region
from sam_infer.prompts.request import parse_region
from sam_infer.types import BoolArray

#: Names under which 3D Slicer lists the two layers of strokes in ``label_info``.
FOREGROUND, BACKGROUND = "foreground_scribbles", "background_scribbles"
#: Values where no ``label_info`` is sent: the object so far, background strokes, foreground strokes.
OBJECT_VALUE, BACKGROUND_VALUE, FOREGROUND_VALUE = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Scribbles:
    """What was painted for one object.

    Args:
        foreground: (I, J, K) bool, voxels painted as object.
        background: (I, J, K) bool, voxels painted as not object.
        existing: (I, J, K) bool, the object so far, to be corrected; None where there is none.
        region: Where the object lies at most, or None.
    """

    foreground: BoolArray
    background: BoolArray
    existing: BoolArray | None
    region: Region | None


def parse_scribbles(
    request: Mapping[str, Any], painted: NDArray[np.integer], *, selected: str | None
) -> Scribbles:
    """Read ``label_info`` and ``roi`` of a scribbles request, and the strokes from its label map.

    What is painted outside the ROI does not count.

    Args:
        request: The request's parameters.
        painted: (I, J, K) integers, the label map that was sent, in the image's voxel order.
        selected: Name of the label that is being drawn: the entry of ``label_info`` that holds it so far.

    Raises:
        InputError: When a value is malformed or not listed, or nothing says where the object is.
    """
    shape: tuple[int, int, int] = painted.shape  # type: ignore[assignment]
    values = _values(request.get("label_info"), selected)
    present = {int(value) for value in np.unique(painted)} - {0}
    for unknown in sorted(present - set(values.values()) - _others(request.get("label_info"))):
        raise InputError(
            "label",
            unknown,
            f"not among {values}; paint with these values, or list others in label_info, with {FOREGROUND} "
            f"and {BACKGROUND} among the names",
            status=422,
        )
    region = parse_region(request.get("roi"), shape)
    layers = {name: painted == value for name, value in values.items()}
    nothing = np.zeros(shape, bool)
    foreground, background = layers.get(FOREGROUND, nothing), layers.get(BACKGROUND, nothing)
    existing = layers.get("object")
    if region is not None:
        if foreground.any() and not foreground[region.voxels].any():
            raise InputError(
                "roi", region.bounds, "every foreground stroke lies outside it; move the roi, or leave it out"
            )
        foreground, background = (_within(layer, region) for layer in (foreground, background))
    existing = _uncovered(existing, foreground | background) if existing is not None else None
    existing = existing if existing is not None and existing.any() else None
    if not foreground.any() and region is None and existing is None:
        raise InputError(
            "label",
            sorted(present),
            f"nothing says where the object is; paint {FOREGROUND}, or send a roi around it",
        )
    return Scribbles(foreground=foreground, background=background, existing=existing, region=region)


def _uncovered(existing: BoolArray, strokes: BoolArray) -> BoolArray:
    """The object so far as it was under the strokes: as it is where each is left, on the same slice."""
    whole = existing.copy()
    for k in np.flatnonzero(strokes.any(axis=(0, 1)) & existing.any(axis=(0, 1))):
        i, j = ndimage.distance_transform_edt(strokes[:, :, k], return_distances=False, return_indices=True)
        whole[:, :, k] = existing[i, j, k]
    return whole


def _within(layer: BoolArray, region: Region) -> BoolArray:
    kept = np.zeros_like(layer)
    kept[region.voxels] = layer[region.voxels]
    return kept


def _values(label_info: object, selected: str | None) -> dict[str, int]:
    """Value of the two layers of strokes and of the "object" so far, of those that are known."""
    if label_info is None or label_info == [] or label_info == "":
        return {FOREGROUND: FOREGROUND_VALUE, BACKGROUND: BACKGROUND_VALUE, "object": OBJECT_VALUE}
    known = _listed(label_info)
    found = {name: known[name] for name in (FOREGROUND, BACKGROUND) if name in known}
    return {**found, "object": known[selected]} if selected in known and selected not in found else found


def _others(label_info: object) -> set[int]:
    return set(_listed(label_info).values()) if label_info else set()


def _listed(label_info: object) -> dict[str, int]:
    """Name to value of ``label_info``, where 3D Slicer calls the value ``id``."""
    remedy = f'send [{{"name": "{FOREGROUND}", "id": 3}}, ...]'
    if not isinstance(label_info, list):
        raise InputError("label_info", label_info, remedy)
    found = {}
    for entry in label_info:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError("label_info", entry, remedy)
        value = entry.get("id", entry.get("value"))
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError("label_info", entry, remedy)
        found[entry["name"]] = value
    return found
