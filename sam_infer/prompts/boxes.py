"""Boxes of one object on several slices."""

from __future__ import annotations

from sam_infer.errors import InputError
from sam_infer.geometry import parse_roi
from sam_infer.types import Box

MAX_BOXES = 64


def parse_boxes(boxes: object, shape: tuple[int, int, int], axis: int = 2) -> dict[int, Box]:
    """Read ``boxes``: one box of the same object on each of some slices.

    Args:
        boxes: [[i0, i1, j0, j1, k, k], ...] in voxels, each as a ROI of one slice; on a 2D image k may be
            left out. None, [] and "" mean that there are none.
        shape: (I, J, K) of the image.
        axis: The voxel axis across whose slices they lie.

    Returns:
        (x0, y0, x1, y1) in slice pixels, by slice along the axis.

    Raises:
        InputError: When a box is malformed, outside the image, of several slices, or the second on its slice.
    """
    if boxes is None or boxes == "" or boxes == []:
        return {}
    if not isinstance(boxes, list) or len(boxes) > MAX_BOXES:
        shown = f"{len(boxes)} boxes" if isinstance(boxes, list) else boxes
        raise InputError(
            "boxes", shown, f"send a list of {MAX_BOXES} boxes at most, [i0, i1, j0, j1, k, k] each"
        )
    found: dict[int, Box] = {}
    for box in boxes:
        region = parse_roi(box, shape, name="boxes").turned(axis)
        k = region.low[2]
        if len(region.slices) > 1:
            raise InputError(
                "boxes",
                box,
                f"each box lies on one slice ({'ijk'[axis]}0 = {'ijk'[axis]}1); a roi may bound several",
            )
        if k in found:
            raise InputError(
                "boxes", box, f"slice {k} has a box already; send one box a slice, of one object"
            )
        found[k] = region.box
    return found
