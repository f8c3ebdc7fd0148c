"""The simulated annotator: where each strategy prompts, and what it costs."""

import numpy as np
import pytest
from scipy import ndimage

from sam_infer.geometry import tight_box
from sam_infer.prompts.annotator import RING, STRATEGIES
from sam_infer.prompts.masks import parts_of
from tests.conftest import disc

SIZE = (90, 120)
BIG, SMALL = disc(SIZE, (40, 40), 14), disc(SIZE, (95, 60), 6)
BOTH = BIG | SMALL
BOXES = [(26.0, 26.0, 54.0, 54.0), (89.0, 54.0, 101.0, 66.0)]
NAMES = (
    "box_component", "box_class", "box_margin5", "box_jitter2", "box_jitter5", "box_jitter10", "box_jitter20",
    "box_jitter_10pct", "box_shift", "point", "points3", "points5", "points10", "points3_negatives3",
    "box_point", "box_negatives3",
)  # fmt: skip


def given(name, mask=BOTH, seed=0):
    return STRATEGIES[name].give(mask, np.random.default_rng(seed))


def test_every_strategy_is_registered_under_its_name():
    assert tuple(STRATEGIES) == NAMES
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_what_is_given_and_a_generator_decides(name):
    for prompt in given(name):
        assert STRATEGIES[name].clicks == len(prompt.points) + 2 * (prompt.box is not None)
        assert not prompt.is_empty and prompt.points.dtype == np.float32
    again = given(name)
    for one, other in zip(given(name), again, strict=True):
        assert one.box == other.box and np.array_equal(one.points, other.points)
    assert given(name, np.zeros(SIZE, bool)) == []


def test_boxes_without_chance():
    assert [p.box for p in given("box_component")] == BOXES == [tight_box(p) for p in parts_of(BOTH)]
    assert [p.box for p in given("box_class")] == [(26.0, 26.0, 101.0, 66.0)]
    assert [p.box for p in given("box_margin5")] == [(21.0, 21.0, 59.0, 59.0), (84.0, 49.0, 106.0, 71.0)]
    corner = np.zeros(SIZE, bool)
    corner[:4, -4:] = True
    assert given("box_margin5", corner)[0].box == (111.0, 0.0, 119.0, 8.0)


@pytest.mark.parametrize("pixels", [2, 5, 10, 20])
def test_jitter_goes_outward_only_and_uses_its_reach(pixels):
    boxes = np.array([given(f"box_jitter{pixels}", BIG, seed)[0].box for seed in range(300)])
    out = (boxes - BOXES[0]) * [-1, -1, 1, 1]
    assert out.min() >= 0 and out.max() <= pixels
    assert (out.min(0) < 0.1 * pixels).all() and (out.max(0) > 0.9 * pixels).all()
    assert abs(np.corrcoef(out.T)[np.triu_indices(4, 1)]).max() < 0.25, "each side by itself"


def test_a_share_of_the_box_goes_either_way():
    boxes = np.array([given("box_jitter_10pct", BIG, seed)[0].box for seed in range(300)])
    moved = boxes - BOXES[0]
    assert (moved.min(0) < -2).all() and (moved.max(0) > 2).all() and abs(moved).max() <= 2.9


def test_the_shift_moves_both_corners_alike():
    for mask, reach in ((BIG, 5), (disc(SIZE, (60, 40), 2), 2)):
        moved = np.array([given("box_shift", mask, seed)[0].box for seed in range(300)]) - tight_box(mask)
        assert np.array_equal(moved[:, :2], moved[:, 2:])
        assert set(moved[:, 0]) == set(moved[:, 1]) == set(range(-reach, reach + 1))


def test_one_point_is_the_distance_maximum_of_each_part():
    for prompt, part in zip(given("point"), (BIG, SMALL), strict=True):
        (x, y), distance = prompt.points[0].astype(int), ndimage.distance_transform_edt(part)
        assert distance[y, x] == distance.max() and prompt.point_labels.tolist() == [1]
    for prompt, box in zip(given("box_point"), BOXES, strict=True):
        assert prompt.box == box and prompt.point_labels.tolist() == [1]


@pytest.mark.parametrize("count", [3, 5, 10])
def test_points_lie_all_over_their_part(count):
    seen = np.zeros(SIZE, int)
    for seed in range(200):
        for prompt, part in zip(given(f"points{count}", seed=seed), (BIG, SMALL), strict=True):
            x, y = prompt.points.astype(int).T
            assert part[y, x].all() and len(set(zip(x, y, strict=True))) == count
            seen[y, x] += 1
    quadrants = [seen[BIG & q].sum() for q in (np.indices(SIZE)[0] < 40, np.indices(SIZE)[0] > 40)]
    assert max(quadrants) < 1.3 * min(quadrants)


@pytest.mark.parametrize("name", ["points3_negatives3", "box_negatives3"])
def test_negatives_lie_in_a_ring_around_their_part_and_away_from_every_part(name):
    near = BIG | disc(SIZE, (63, 40), 4)  # 4 to 13 pixels beside the large one
    to_all = ndimage.distance_transform_edt(~near)
    distances = []
    for seed in range(100):
        for prompt, part in zip(given(name, near, seed), parts_of(near), strict=True):
            x, y = prompt.negative.astype(int).T
            to_part = ndimage.distance_transform_edt(~part)[y, x]
            assert (to_all[y, x] >= RING[0]).all() and (to_part <= RING[1]).all()
            distances += to_part.tolist()
    assert min(distances) < 6 and max(distances) > 14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", ["pixel", "two", "full", "corner"])
def test_small_and_large_objects_do_not_break(name, mask):
    masks = {key: np.zeros((12, 9), bool) for key in ("pixel", "two", "full", "corner")}
    masks["pixel"][5, 4] = masks["two"][5, 4] = masks["two"][6, 5] = masks["corner"][11, 8] = True
    masks["full"][...] = True
    (prompt,) = given(name, masks[mask])
    for x, y in prompt.positive.astype(int):
        assert masks[mask][y, x]
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box
        assert 0 <= x0 <= x1 <= 8 and 0 <= y0 <= y1 <= 11
    if mask == "full":
        assert not len(prompt.negative)
