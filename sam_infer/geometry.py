"""The one place where coordinates change meaning: voxel, slice pixel, and the order of region bounds.

Voxel indices (i, j, k) are those of the file's own storage order, as 3D Slicer and OHIF send them. Slice k
of a volume of shape (I, J, K) is the image of shape (H, W) = (J, I) whose column x is i and whose row y is
j, so a voxel (i, j, k) is the pixel (x, y) = (i, j) of slice k. A 2D image of W columns and H rows is the
volume (W, H, 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.errors import InputError
from sam_infer.types import Box

#: LPS (DICOM, NRRD, ITK) to RAS (NIfTI, 3D Slicer): the first two world axes change sign.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: How far the corners of two grids may lie apart that are taken for one, in voxels: headers are rounded.
SAME_PLACE = 0.1
#: Clicks of one kind on one object; each is decoded by itself.
MAX_POINTS = 256
_FAR_MM = 1e9


def slice_image(volume: NDArray, k: int) -> NDArray:
    """Slice ``k`` as an image.

    Args:
        volume: (I, J, K) or (I, J, K, C), voxel order.
        k: Slice index.

    Returns:
        (H, W) = (J, I), or (H, W, C): a view, row y = j, column x = i.
    """
    return np.swapaxes(volume[:, :, k], 0, 1)


def put_slice(volume: NDArray, k: int, image: NDArray) -> None:
    """Write an (H, W) image into slice ``k`` of an (I, J, K) volume, in place."""
    volume[:, :, k] = image.T


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box of voxels, both ends included.

    Args:
        low: (i, j, k) of the lowest corner.
        high: (i, j, k) of the highest corner, at least ``low`` everywhere.
    """

    low: tuple[int, int, int]
    high: tuple[int, int, int]

    @classmethod
    def of_box(cls, box: Box, k: int) -> Region:
        """The voxels of (x0, y0, x1, y1), slice pixels, on slice ``k``."""
        x0, y0, x1, y1 = (round(side) for side in box)
        return cls(low=(x0, y0, k), high=(x1, y1, k))

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1) in slice pixels."""
        return (float(self.low[0]), float(self.low[1]), float(self.high[0]), float(self.high[1]))

    @property
    def slices(self) -> range:
        """The slice indices k of the region."""
        return range(self.low[2], self.high[2] + 1)

    @property
    def bounds(self) -> list[int]:
        """[i0, i1, j0, j1, k0, k1], both ends included."""
        return [bound for pair in zip(self.low, self.high, strict=True) for bound in pair]

    @property
    def voxels(self) -> tuple[slice, slice, slice]:
        """The index of the region's voxels in an (I, J, K) array."""
        i, j, k = (slice(low, high + 1) for low, high in zip(self.low, self.high, strict=True))
        return i, j, k

    def turned(self, axis: int) -> Region:
        """The region with axes ``axis`` and 2 exchanged."""
        low, high = list(self.low), list(self.high)
        for corner in (low, high):
            corner[axis], corner[2] = corner[2], corner[axis]
        return Region(low=(low[0], low[1], low[2]), high=(high[0], high[1], high[2]))

    def cut(self, volume: NDArray) -> NDArray:
        """The region of an (I, J, K) volume: a view."""
        return volume[self.voxels]

    def affine(self, affine: NDArray[np.float64]) -> NDArray[np.float64]:
        """(4, 4) voxel to world of what `cut` gives, from that of the volume."""
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :3] @ np.array(self.low)
        return moved


def parse_roi(roi: object, shape: Sequence[int], *, name: str = "roi") -> Region:
    """Read a region of interest as 3D Slicer sends it.

    Args:
        roi: [i0, i1, j0, j1, k0, k1] in voxels, the pairs in any order; 2D images may leave k out.
        shape: (I, J, K) of the image.
        name: The argument's name, for the error.

    Returns:
        The region, sorted and clipped to the image.

    Raises:
        InputError: When it is not four or six finite numbers, or lies outside the image.
    """
    order = "[i0, i1, j0, j1, k0, k1] in voxel indices of the image"
    try:
        bounds = np.asarray(roi, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(name, roi, f"send six numbers {order}") from None
    if bounds.shape == (4,) and shape[2] == 1:
        bounds = np.concatenate([bounds, [0.0, 0.0]])
    if bounds.shape != (6,) or not np.isfinite(bounds).all():
        raise InputError(name, roi, f"send six finite numbers {order}")
    pairs = np.sort(np.clip(np.rint(bounds), -(2**30), 2**30).astype(int).reshape(3, 2), axis=1)
    size = np.asarray(shape[:3])
    if (pairs[:, 1] < 0).any() or (pairs[:, 0] >= size).any():
        raise InputError(
            name, roi, f"the region lies outside the image of shape {tuple(size.tolist())}; send {order}"
        )
    low = np.clip(pairs[:, 0], 0, size - 1).tolist()
    high = np.clip(pairs[:, 1], 0, size - 1).tolist()
    return Region(low=(low[0], low[1], low[2]), high=(high[0], high[1], high[2]))


def parse_points(name: str, points: object, shape: Sequence[int]) -> NDArray[np.int64]:
    """Read clicks as the viewers send them.

    Args:
        name: The argument's name, for the error.
        points: [[i, j, k], ...] in voxels; on a 2D image [x, y] or [x, y, 0] (column, row). A single
            bare point and an empty list are accepted.
        shape: (I, J, K) of the image.

    Returns:
        (N, 3) int64 voxel indices.

    Raises:
        InputError: When a point is malformed or outside the image.
    """
    flat = shape[2] == 1
    form = "[[x, y], ...] (column, row)" if flat else "[[i, j, k], ...] in voxel indices"
    if points is None or (isinstance(points, list | tuple) and not points):
        return np.zeros((0, 3), np.int64)
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(name, points, f"send {form}") from None
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 2 and array.shape[1] == 2 and flat:
        array = np.concatenate([array, np.zeros((len(array), 1))], axis=1)
    if array.ndim != 2 or array.shape[1] != 3 or not np.isfinite(array).all():
        raise InputError(name, points, f"send {form}")
    if len(array) > MAX_POINTS:
        raise InputError(name, f"{len(array)} points", f"send at most {MAX_POINTS}")
    size = np.asarray(shape[:3])
    rounded = np.rint(array)
    outside = ((rounded < 0) | (rounded >= size)).any(axis=1)
    if outside.any():
        raise InputError(
            name,
            array[outside][0].tolist(),
            f"the point lies outside the image of shape {tuple(size.tolist())} (i, j, k from 0); send {form}",
        )
    return rounded.astype(np.int64)


def union_box(boxes: Sequence[Box]) -> Box:
    """The smallest (x0, y0, x1, y1) around one or more boxes."""
    table = np.array(boxes)
    (x0, y0), (x1, y1) = table[:, :2].min(0).tolist(), table[:, 2:].max(0).tolist()
    return (x0, y0, x1, y1)


def widen_box(box: Box, by: Sequence[float], size: tuple[int, int]) -> Box:
    """A box whose sides move outward.

    Args:
        box: (x0, y0, x1, y1) in slice pixels.
        by: Move of each side in pixels, in the order x0, y0, x1, y1.
        size: (H, W) of the slice in pixels; the result is clipped to it.
    """
    height, width = size
    left, top, right, bottom = by
    return (
        max(0.0, box[0] - left),
        max(0.0, box[1] - top),
        min(width - 1.0, box[2] + right),
        min(height - 1.0, box[3] + bottom),
    )


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest part of an (H, W) or (I, J, K) mask that hangs together, over corners too.

    The first in array order wins a tie; an empty mask stays as it is.
    """
    parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest: NDArray[np.bool_] = parts == sizes.argmax()
    return largest


def innermost(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """Index of the pixel with the greatest distance to a mask's outside.

    Args:
        mask: Bool, of two or three dimensions, not empty. Beyond its border is outside; distances are in
            pixels, and the first in array order wins a tie.
    """
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    distance = ndimage.distance_transform_edt(np.pad(mask[box], 1))
    index = np.unravel_index(int(np.argmax(distance)), distance.shape)
    return tuple(int(n) - 1 + part.start for n, part in zip(index, box, strict=True))


def tight_box(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest (x0, y0, x1, y1) around an (H, W) mask, outermost pixels included; None when empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return (float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1]))


def filled_region(
    volume: NDArray, slices: Iterable[int], *, other: NDArray[np.bool_] | None = None
) -> Region | None:
    """The smallest region that holds all that is set in a volume, or that differs from another.

    Args:
        volume: (I, J, K); not 0 is set.
        slices: Slice indices k to look at.
        other: (I, J, K) bool; None = nothing is set.

    Returns:
        The region; None where there is nothing.
    """
    boxes = {}
    for k in slices:
        mask = slice_image(volume, k) != 0
        box = tight_box(mask if other is None else mask ^ slice_image(other, k))
        if box is not None:
            boxes[k] = box
    if not boxes:
        return None
    table = np.array(list(boxes.values())).astype(int)
    (i0, j0), (i1, j1) = table[:, :2].min(0).tolist(), table[:, 2:].max(0).tolist()
    return Region(low=(i0, j0, min(boxes)), high=(i1, j1, max(boxes)))


def slice_distance(affine: NDArray[np.float64]) -> float:
    """Distance between neighbouring slices, in pixels of a slice.

    Args:
        affine: (4, 4) voxel to world in mm.
    """
    i, j, k = np.linalg.norm(affine[:3, :3], axis=0)
    return float(k / max((i + j) / 2, 1e-6))


def is_regular(affine: NDArray[np.float64]) -> bool:
    """True where a (4, 4) voxel to world matrix in mm is finite, of this world, and can be inverted."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and np.abs(affine).max() < _FAR_MM and sides.min() > 1 / _FAR_MM):
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / sides)) > 1e-6)


def turned_onto(
    array: NDArray, affine: NDArray[np.float64], *, target: NDArray[np.float64], shape: Sequence[int]
) -> tuple[NDArray, float]:
    """The voxels of one grid in the order of another, whose axes may be permuted and flipped.

    Args:
        array: (I, J, K) in the order of its own file.
        affine: (4, 4) voxel to world RAS in mm, of ``array``.
        target: (4, 4) voxel to world RAS in mm, of the other grid.
        shape: (I, J, K) of the other grid.

    Returns:
        A view of ``array``, and how far from the other grid's corners its own then lie, in voxels at most;
        up to `SAME_PLACE` both cover the same place. ``array`` itself and infinity where the shapes differ.
    """
    between = np.linalg.inv(target) @ affine
    turn = nib.orientations.io_orientation(between)
    same = np.array_equal(turn, [(0, 1), (1, 1), (2, 1)])
    turned = array if same else nib.orientations.apply_orientation(array, turn)
    if turned.shape != tuple(shape):
        return array, float("inf")
    between = between @ nib.orientations.inv_ornt_aff(turn, array.shape)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
    moved = nib.affines.apply_affine(between, corners) - corners
    return turned, float(np.abs(moved).max())
