import numpy as np
import pytest
from scipy import ndimage

from sam_infer.geometry import tight_box
from sam_infer.prompts.activation import activation_box, activation_parts, box_iou


def hills():
    """Two hills on a plain: the lower one is the wider."""
    rows, columns = np.mgrid[:40, :60]
    high = np.exp(-((rows - 10) ** 2 + (columns - 14) ** 2) / 18.0)
    low = 0.8 * np.exp(-((rows - 28) ** 2 + (columns - 42) ** 2) / 80.0)
    found = np.maximum(high, low)
    return ((found - found.min()) / (found.max() - found.min())).astype(np.float32)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
def test_the_box_is_around_the_part_with_the_peak_however_large_another_is(threshold):
    found = hills()
    parts, count = ndimage.label(found >= threshold, np.ones((3, 3)))
    assert count == 2
    peak = np.unravel_index(found.argmax(), found.shape)
    assert activation_box(found, threshold=threshold) == tight_box(parts == parts[peak])
    assert np.count_nonzero(parts == parts[peak]) < np.count_nonzero((parts > 0) & (parts != parts[peak]))


def test_every_part_comes_on_request_the_highest_peak_first():
    parts = activation_parts(hills(), every=True)
    assert [tight_box(part)[:2] for part in parts] == [(10.0, 6.0), (35.0, 21.0)]
    assert not (parts[0] & parts[1]).any()
    assert len(activation_parts(hills(), threshold=0.9, every=True)) == 1


def test_parts_hang_together_over_corners():
    found = np.zeros((6, 6), np.float32)
    found[1, 1], found[2, 2], found[4, 5] = 1.0, 0.5, 0.6
    assert activation_box(found) == (1.0, 1.0, 2.0, 2.0)
    assert [int(part.sum()) for part in activation_parts(found, every=True)] == [2, 1]


def test_nothing_gives_no_box_and_none_in_the_middle():
    nothing = np.full((10, 10), 0.39, np.float32)
    assert activation_parts(nothing, every=True) == [] and activation_box(nothing) is None


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_a_threshold_that_means_nothing_is_named(threshold):
    with pytest.raises(ValueError, match="threshold"):
        activation_parts(hills(), threshold=threshold)


def test_iou_of_boxes_is_that_of_their_pixels():
    rng = np.random.default_rng(0)
    for _ in range(30):
        boxes, masks = [], []
        for _ in range(2):
            (x0, x1), (y0, y1) = (sorted(rng.integers(0, 12, 2).tolist()) for _ in range(2))
            boxes.append((float(x0), float(y0), float(x1), float(y1)))
            masks.append(np.zeros((12, 12), bool))
            masks[-1][y0 : y1 + 1, x0 : x1 + 1] = True
        assert box_iou(*boxes) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
