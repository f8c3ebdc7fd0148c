"""The simulated clinician: where to click next, and when to stop. Pure functions of masks.

Masks are (I, J, K) in the image's voxel order; a 2D image of W columns and H rows is (W, H, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from sam_infer.geometry import slice_image
from sam_infer.overlap import dice
from sam_infer.prompts.simulated import next_click
from sam_infer.types import BoolArray

BOX_COST = 2
_NEIGHBOURS = np.ones((3, 3, 3), bool)

#: [i0, i1, j0, j1, k0, k1] in voxels, both ends included.
Roi = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Click:
    """One click.

    Args:
        voxel: (i, j, k) of the image.
        positive: True where the object was missed, False where too much was included.
        reach: Half the radius of the clicked part, in pixels of its slice, at least 2.
    """

    voxel: tuple[int, int, int]
    positive: bool
    reach: float = 2.0


@dataclass(kw_only=True)
class Drawing:
    """What became of one object.

    Args:
        mask: (I, J, K) bool, as the clinician leaves it.
        dice: Its Dice against the truth.
        clicks: Clicks spent, the undone ones included; a box counts `BOX_COST`.
        boxed: Whether it began with a box.
        undone: Clicks that made the mask worse and were taken back.
        history: Dice after every request, undone ones included.
    """

    mask: BoolArray
    dice: float
    clicks: int = 0
    boxed: bool = False
    undone: int = 0
    history: list[float] = field(default_factory=list)


#: (clicks so far, box or None) -> (I, J, K) bool: the server's mask.
Ask = Callable[[Sequence[Click], Roi | None], BoolArray]


def place_click(truth: BoolArray, mask: BoolArray, ignore: BoolArray | None = None) -> Click | None:
    """The next corrective click.

    The largest error component of the volume (26-neighbourhood, all missed or all wrongly included) is
    found, then the slice on which it has the largest area, then the innermost pixel there.

    Args:
        truth: (I, J, K) bool.
        mask: (I, J, K) bool, the present mask.
        ignore: (I, J, K) bool, voxels that are not clicked; None for none.

    Returns:
        The click, or None where nothing is left to correct.
    """
    best: tuple[int, BoolArray, bool] | None = None
    for error, positive in ((truth & ~mask, True), (mask & ~truth, False)):
        component = _largest_component(error if ignore is None else error & ~ignore)
        size = int(component.sum())
        if size and (best is None or size > best[0]):
            best = size, component, positive
    if best is None:
        return None
    _, component, positive = best
    areas = component.sum((0, 1))
    k = int(np.argmax(areas))
    plane = np.ascontiguousarray(slice_image(component, k))
    found = next_click(plane, np.zeros_like(plane))
    assert found is not None  # the component has pixels on its largest slice
    reach = max(2.0, 0.5 * float(np.sqrt(areas[k] / np.pi)))
    return Click(voxel=(int(found[0]), int(found[1]), k), positive=positive, reach=reach)


def first_box(truth: BoolArray) -> Roi:
    """The tight box around the truth on the slice where it is largest.

    Args:
        truth: (I, J, K) bool with at least one voxel.
    """
    k = int(np.argmax(truth.sum((0, 1))))
    i, j = np.nonzero(truth[:, :, k])
    return int(i.min()), int(i.max()), int(j.min()), int(j.max()), k, k


def draw(
    ask: Ask,
    truth: BoolArray,
    start: BoolArray | None = None,
    *,
    budget: int,
    accept_dice: float,
    box_first: bool = False,
) -> Drawing:
    """Correct one object until it is good enough or the budget is spent.

    The server sees all clicks so far every time. A click after which Dice is lower is undone: the mask and
    the clicks are those before it, and it still counts. Around a click that was undone, or that did not
    change its own voxel, the clinician does not try again.

    Args:
        ask: Sends the prompts and returns the (I, J, K) bool mask.
        truth: (I, J, K) bool.
        start: (I, J, K) bool, a proposal to correct; None to begin with nothing.
        budget: Greatest number of clicks.
        accept_dice: Dice from which the clinician is content.
        box_first: Begin with a box instead of a click, where there is no start and the budget has room.
    """
    mask = np.zeros_like(truth) if start is None else start
    result = Drawing(mask=mask, dice=dice(mask, truth))
    ignore = np.zeros_like(truth)
    placed: list[Click] = []
    roi: Roi | None = None
    if box_first and start is None and budget >= BOX_COST and truth.any():
        roi = first_box(truth)
        result.mask = ask(placed, roi)
        result.dice = dice(result.mask, truth)
        result.clicks, result.boxed = BOX_COST, True
        result.history.append(result.dice)
    while result.dice < accept_dice and result.clicks < budget:
        click = place_click(truth, result.mask, ignore)
        if click is None:
            break
        answer = ask([*placed, click], roi)
        after = dice(answer, truth)
        result.clicks += 1
        result.history.append(after)
        if after < result.dice:
            result.undone += 1
            _ignore_around(ignore, click)
            continue
        if answer[click.voxel] != click.positive:
            _ignore_around(ignore, click)
        placed.append(click)
        result.mask, result.dice = answer, after
    return result


def _largest_component(error: BoolArray) -> BoolArray:
    boxes = ndimage.find_objects(error.astype(np.uint8))
    found = np.zeros_like(error)
    if boxes and boxes[0] is not None:
        labels, _ = ndimage.label(error[boxes[0]], _NEIGHBOURS)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        found[boxes[0]] = labels == int(np.argmax(sizes))
    return found


def _ignore_around(ignore: BoolArray, click: Click) -> None:
    """Add a disc around the click to ``ignore``, on its slice and the two beside it."""
    i, j, k = click.voxel
    rows, columns = np.ogrid[: ignore.shape[0], : ignore.shape[1]]
    disc = (rows - i) ** 2 + (columns - j) ** 2 <= click.reach**2
    ignore[:, :, max(0, k - 1) : k + 2] |= disc[:, :, None]
