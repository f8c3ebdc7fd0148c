"""Islands: parts of a mask that hang together with nothing else, removed on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.errors import InputError
from sam_infer.prompts.request import parse_flag


@dataclass(frozen=True, kw_only=True)
class IslandRule:
    """Which islands to remove; none by default.

    Args:
        keep_largest: Keep the largest part only.
        min_voxels: Remove parts of fewer voxels.
    """

    keep_largest: bool = False
    min_voxels: int = 0

    @property
    def asked(self) -> bool:
        """True where anything is to be removed."""
        return self.keep_largest or self.min_voxels > 1


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What was removed.

    Args:
        components: How many parts.
        voxels: How many voxels they had together.
    """

    components: int = 0
    voxels: int = 0


def parse_islands(request: Mapping[str, Any]) -> IslandRule:
    """``keep_largest`` (true or false) and ``min_island_voxels`` (a whole number).

    Raises:
        InputError: When either is something else.
    """
    return IslandRule(
        keep_largest=parse_flag("keep_largest", request.get("keep_largest")),
        min_voxels=_whole("min_island_voxels", request.get("min_island_voxels")),
    )


def _whole(name: str, value: object) -> int:
    try:
        number = float(value) if isinstance(value, int | float | str) and value != "" else 0.0
    except (ValueError, OverflowError):
        number = -1.0
    if isinstance(value, bool | list | dict) or not (0 <= number < 2**53 and number == int(number)):
        raise InputError(name, value, "send a whole number of voxels, 0 or more")
    return int(number)


def remove_islands(labelmap: NDArray[np.uint8], rule: IslandRule) -> Removed:
    """Remove islands from a label map, in place.

    Voxels that share a corner hang together, so that thin slanting parts stay in one piece.

    Args:
        labelmap: (I, J, K) uint8, 0 or 1.
        rule: What to remove. Of equally large parts, the first in voxel order counts as the largest.

    Returns:
        What was removed.
    """
    if not rule.asked:
        return Removed()
    found = ndimage.find_objects(labelmap)
    if not found:
        return Removed()
    inside = labelmap[found[0]]
    parts, count = ndimage.label(inside, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    gone = sizes < rule.min_voxels
    if rule.keep_largest:
        gone |= np.arange(count) != np.argmax(sizes)
    if gone.any():
        inside[np.concatenate([[False], gone])[parts]] = 0
    return Removed(components=int(gone.sum()), voxels=int(sizes[gone].sum()))
