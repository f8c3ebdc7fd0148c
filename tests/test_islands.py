"""Islands are removed when asked for, and counted."""

import numpy as np
import pytest

from sam_infer.errors import InputError
from sam_infer.islands import IslandRule, Removed, parse_islands, remove_islands


@pytest.fixture
def labelmap():
    """A block of 64 voxels, a chain of 3 that touches it by a corner, and islands of 2 and 8 voxels."""
    volume = np.zeros((20, 20, 10), np.uint8, order="F")
    volume[2:6, 2:6, 2:6] = 1
    volume[(6, 7, 8), (6, 7, 8), (6, 7, 8)] = 1
    volume[15, 15, 1:3] = 1
    volume[10:12, 2:4, 0:2] = 1
    return volume


@pytest.mark.parametrize(
    ("rule", "removed", "left"),
    [
        (IslandRule(), Removed(), 77),
        (IslandRule(min_voxels=1), Removed(), 77),
        (IslandRule(min_voxels=2), Removed(), 77),
        (IslandRule(min_voxels=3), Removed(components=1, voxels=2), 75),
        (IslandRule(min_voxels=9), Removed(components=2, voxels=10), 67),
        (IslandRule(keep_largest=True), Removed(components=2, voxels=10), 67),
        (IslandRule(min_voxels=100), Removed(components=3, voxels=77), 0),
    ],
)
def test_what_is_removed_is_counted(labelmap, rule, removed, left):
    assert remove_islands(labelmap, rule) == removed
    assert labelmap.sum() == left


def test_one_of_two_equally_large_parts_stays():
    labelmap = np.zeros((9, 3, 1), np.uint8)
    labelmap[[0, 8]] = 1
    assert remove_islands(labelmap, IslandRule(keep_largest=True)) == Removed(components=1, voxels=3)
    assert labelmap.any(axis=(1, 2)).tolist() == [True] + 8 * [False]


def test_an_empty_mask_has_no_islands():
    assert remove_islands(np.zeros((3, 3, 3), np.uint8), IslandRule(keep_largest=True)) == Removed()


def test_what_viewers_send_is_understood():
    assert parse_islands({}) == IslandRule()
    assert parse_islands({"keep_largest": None, "min_island_voxels": ""}) == IslandRule()
    assert parse_islands({"keep_largest": "true", "min_island_voxels": "30"}) == IslandRule(
        keep_largest=True, min_voxels=30
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_largest", v) for v in ("yes", 7, [], {})]
    + [
        ("min_island_voxels", v)
        for v in (-1, 1.5, "many", True, [1], {}, float("nan"), float("inf"), 10**400)
    ],
)
def test_anything_else_is_refused(name, value):
    with pytest.raises(InputError, match=name):
        parse_islands({name: value})
