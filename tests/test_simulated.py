"""The simulated annotator's pure functions."""

import numpy as np
import pytest
from scipy import ndimage

from sam_infer.prompts.simulated import jitter_box, next_click


def _square(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((40, 50), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_first_click_is_the_innermost_pixel() -> None:
    truth = _square(10, 21, 20, 31)
    assert next_click(truth, np.zeros_like(truth)) == (25.0, 15.0, 1)


def test_click_goes_to_the_larger_error_and_says_which_kind() -> None:
    truth, mask = _square(5, 15, 5, 15), _square(20, 35, 20, 35)
    assert next_click(truth, mask) == (27.0, 27.0, 0)
    assert next_click(mask, truth) == (27.0, 27.0, 1)


def test_missed_part_goes_first_when_equal() -> None:
    click = next_click(_square(5, 12, 5, 12), _square(20, 27, 20, 27))
    assert click == (8.0, 8.0, 1)


def test_no_click_where_nothing_is_wrong() -> None:
    assert next_click(_square(5, 9, 5, 9), _square(5, 9, 5, 9)) is None


def test_click_is_the_distance_maximum_of_a_ragged_component() -> None:
    field = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((60, 70)), 4)
    truth = field > 0.02
    click = next_click(truth, np.zeros_like(truth))
    assert click is not None
    parts, _ = ndimage.label(truth, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    largest = parts == 1 + int(sizes.argmax())
    distance = ndimage.distance_transform_edt(np.pad(largest, 1))[1:-1, 1:-1]
    assert distance[int(click[1]), int(click[0])] == distance.max()


def test_border_counts_as_outside() -> None:
    truth = np.ones((11, 11), bool)
    assert next_click(truth, np.zeros_like(truth)) == (5.0, 5.0, 1)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="equal shape"):
        next_click(np.zeros((3, 4), bool), np.zeros((4, 3), bool))


def test_jitter_stays_in_reach_and_in_the_image() -> None:
    box = (1.0, 5.0, 40.0, 24.0)
    moved = np.array([jitter_box(box, 0.1, np.random.default_rng(n), (30, 42)) for n in range(200)])
    assert (np.abs(moved - box) <= [4.0, 2.0, 4.0, 2.0]).all()
    assert np.abs(moved - box).max(0).min() > 0.9  # every side moves
    assert moved[:, 0].min() >= 0 and moved[:, 2].max() <= 41
    assert jitter_box(box, 0.0, np.random.default_rng(0), (30, 42)) == box
    assert jitter_box(box, 0.1, np.random.default_rng(3), (30, 42)) == jitter_box(
        box, 0.1, np.random.default_rng(3), (30, 42)
    )
    with pytest.raises(ValueError, match="fraction"):
        jitter_box(box, -0.1, np.random.default_rng(0), (30, 42))
