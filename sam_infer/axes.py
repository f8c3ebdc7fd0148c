"""Slices along another axis: the same volume, seen so that its slices are those of that axis.

Everything in 3D works on slices k of a volume (I, J, K). Slices along axis 0 or 1 are slices k of a view
whose axes are exchanged; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_infer.errors import InputError
from sam_infer.geometry import parse_roi
from sam_infer.prompts.request import Clicks
from sam_infer.volumes import Image

_NAMES = {"0": 0, "i": 0, "1": 1, "j": 1, "2": 2, "k": 2}


def parse_axis(request: Mapping[str, Any], shape: tuple[int, int, int]) -> int:
    """``axis``: 0, 1 or 2 (also "i", "j", "k"), the voxel axis across whose slices an object is followed.

    Where it is not sent, it is the only axis along which ``roi`` is one voxel thick, else 2.

    Args:
        request: The request's parameters.
        shape: (I, J, K) of the image.

    Raises:
        InputError: When it is none of these, or not 2 on a 2D image.
    """
    sent = request.get("axis")
    if sent is None or sent == "":
        roi = request.get("roi")
        if shape[2] == 1 or roi is None or roi == [] or roi == "":
            return 2
        region = parse_roi(roi, shape)
        thin = [axis for axis in range(3) if region.low[axis] == region.high[axis]]
        return thin[0] if len(thin) == 1 else 2
    axis = (
        None if isinstance(sent, bool) or not isinstance(sent, int | str) else _NAMES.get(str(sent).lower())
    )
    if axis is None:
        raise InputError("axis", sent, 'send 0, 1 or 2, or "i", "j" or "k"')
    if axis != 2 and shape[2] == 1:
        raise InputError("axis", sent, "a 2D image has slices along axis 2 only; leave it out")
    return axis


def turned_array(array: NDArray, axis: int) -> NDArray:
    """A view of an (I, J, K) or (I, J, K, C) array in which axes ``axis`` and 2 are exchanged."""
    return np.swapaxes(array, axis, 2)


def turned_image(image: Image, axis: int) -> Image:
    """The image with axes ``axis`` and 2 exchanged: a view, under a key of its own."""
    if axis == 2:
        return image
    affine = image.affine.copy()
    affine[:, [axis, 2]] = affine[:, [2, axis]]
    return replace(
        image, array=turned_array(image.array, axis), affine=affine, key=(*image.key, "axis", axis)
    )


def turned_clicks(clicks: Clicks, axis: int) -> Clicks:
    """The clicks on `turned_image`; ``slice``, ``boxes`` and ``masks`` count along ``axis`` already."""
    if axis == 2:
        return clicks
    foreground, background = clicks.foreground.copy(), clicks.background.copy()
    for points in (foreground, background):
        points[:, [axis, 2]] = points[:, [2, axis]]
    region = clicks.region
    existing = clicks.existing
    return replace(
        clicks,
        foreground=foreground,
        background=background,
        region=None if region is None else region.turned(axis),
        existing=None if existing is None else turned_array(existing, axis),
    )
