"""Lassos: closed polygons drawn around an object, or around what does not belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon

from sam_infer.errors import InputError
from sam_infer.prompts.simulated import next_click
from sam_infer.types import BoolArray

#: Polygons of one kind, and vertices of all of them.
MAX_POLYGONS, MAX_VERTICES = 64, 4096
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Lasso:
    """What polygons of one kind enclose.

    Args:
        masks: (H, W) bool, the pixels whose centres lie inside, by slice along the axis.
        points: (N, 3) int64 voxels, the innermost of each polygon.
    """

    masks: dict[int, BoolArray]
    points: NDArray[np.int64]


def parse_lasso(name: str, polygons: object, shape: tuple[int, int, int], axis: int = 2) -> Lasso:
    """Read polygons as masks.

    Args:
        name: The argument's name, for the error.
        polygons: [[[i, j, k], ...], ...] in voxels, each polygon on one slice, closed by itself; on a 2D
            image [x, y] (column, row). A single bare polygon is accepted; None, [] and "" mean none.
        shape: (I, J, K) of the image.
        axis: The voxel axis across whose slices they lie.

    Raises:
        InputError: When a polygon is malformed, leaves the image or its slice, crosses itself, has fewer than
            3 vertices, or encloses no pixel; when there are too many.
    """
    masks: dict[int, BoolArray] = {}
    points = []
    vertices = 0
    for sent in _listed(name, polygons):
        corners, k = _corners(name, sent, shape, axis)
        vertices += len(corners)
        if vertices > MAX_VERTICES:
            raise InputError(name, f"{vertices} vertices", f"send at most {MAX_VERTICES}, of all polygons")
        if _crosses_itself(corners):
            raise InputError(name, sent, "the polygon crosses itself; send its outline once around")
        width, height = (shape[2 if n == axis else n] for n in (0, 1))
        mask = np.zeros((height, width), bool)
        mask[polygon(corners[:, 1], corners[:, 0], mask.shape)] = True
        inner = next_click(mask, np.zeros_like(mask))
        if inner is None:
            raise InputError(name, sent, "the polygon encloses no voxel; draw it larger")
        masks[k] = masks[k] | mask if k in masks else mask
        voxel = [inner[0], inner[1], k]
        voxel[axis], voxel[2] = voxel[2], voxel[axis]
        points.append(voxel)
    return Lasso(masks=masks, points=np.array(points, np.int64).reshape(-1, 3))


def _listed(name: str, polygons: object) -> Sequence[Any]:
    if polygons is None or polygons == "" or polygons == []:
        return []
    remedy = "send [[[i, j, k], ...], ...], a list of polygons"
    if not isinstance(polygons, list):
        raise InputError(name, polygons, remedy)
    first = polygons[0]
    if isinstance(first, list) and first and isinstance(first[0], int | float):
        polygons = [polygons]
    if len(polygons) > MAX_POLYGONS:
        raise InputError(name, f"{len(polygons)} polygons", f"send at most {MAX_POLYGONS}")
    return polygons


def _corners(
    name: str, sent: object, shape: tuple[int, int, int], axis: int
) -> tuple[NDArray[np.float64], int]:
    """(N, 2) xy of a polygon's corners, and its slice."""
    flat = shape[2] == 1
    form = "[[x, y], ...] (column, row)" if flat else "[[i, j, k], ...] in voxel indices"
    if isinstance(sent, list) and len(sent) > MAX_VERTICES:
        raise InputError(name, f"{len(sent)} vertices", f"send at most {MAX_VERTICES}, of all polygons")
    try:
        array = np.asarray(sent, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(name, sent, f"send each polygon as {form}") from None
    if array.ndim == 2 and array.shape[1] == 2 and flat:
        array = np.concatenate([array, np.zeros((len(array), 1))], axis=1)
    if array.ndim != 2 or array.shape[1] != 3 or not np.isfinite(array).all():
        raise InputError(name, sent, f"send each polygon as {form}")
    if len(array) > 1 and np.array_equal(array[0], array[-1]):
        array = array[:-1]
    if len(array) < 3:
        raise InputError(name, sent, "a polygon has 3 vertices or more")
    outside = ((array < -0.5) | (array > np.array(shape) - 0.5)).any(axis=1)
    if outside.any():
        raise InputError(
            name,
            array[outside][0].tolist(),
            f"the vertex lies outside the image of shape {shape}; send {form}",
        )
    array[:, [axis, 2]] = array[:, [2, axis]]
    slices = np.unique(np.rint(array[:, 2]))
    if len(slices) > 1:
        raise InputError(
            name,
            sent,
            f"a polygon lies on one slice; here {'ijk'[axis]} goes from {slices[0]:g} to {slices[-1]:g}",
        )
    return array[:, :2], int(min(max(slices[0], 0), shape[axis] - 1))


def _crosses_itself(corners: NDArray[np.float64]) -> bool:
    """True where two sides of a closed polygon cross; touching is no crossing."""
    start, end = corners, np.roll(corners, -1, axis=0)
    low, high = np.minimum(start, end), np.maximum(start, end)
    for first in range(0, len(start), _ROWS):
        rows = slice(first, first + _ROWS)
        near = (low[rows, None] < high[None]).all(-1) & (high[rows, None] > low[None]).all(-1)
        one, other = np.nonzero(near)
        a, b, c, d = start[one + first], end[one + first], start[other], end[other]
        if ((_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)).any():
            return True
    return False


def _side(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sign of the area of the triangles a, b, c: on which side of the line ab the point c lies."""
    u, v = b - a, c - a
    return np.sign(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
