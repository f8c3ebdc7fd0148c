"""Masks from boxes alone: on one slice, through slices, and where two claim the same voxels."""

import numpy as np
import pytest

from sam_infer.boxed import masks_from_boxes
from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import Region
from sam_infer.intensity import EIGHT_BIT
from sam_infer.volumes import Image
from tests.fakes import ThresholdEngine


@pytest.fixture
def volume():
    """Two bright blocks, (i 5..14, j 6..15, k 3..8) and (i 20..27, j 6..11, k 5)."""
    array = np.zeros((40, 30, 12), np.uint8)
    array[5:15, 6:16, 3:9] = 200
    array[20:28, 6:12, 5] = 220
    return Image(array=array, affine=np.eye(4), key=("blocks",), flat=False)


def fill(image, boxes):
    encoder = SliceEncoder(engine=ThresholdEngine())
    return masks_from_boxes(image, boxes, encoder=encoder, window=EIGHT_BIT)


def test_a_box_of_one_slice_labels_that_slice_only(volume):
    found = fill(volume, {7: [Region(low=(3, 4, 5), high=(16, 17, 5))]})
    expected = np.zeros(volume.shape, np.uint8)
    expected[5:15, 6:16, 5] = 7
    assert np.array_equal(found.labelmap, expected) and found.slices == [5]
    assert found.scores == {7: pytest.approx(0.9)}


def test_a_box_of_several_slices_is_followed_and_bounds_the_object(volume):
    found = fill(volume, {7: [Region(low=(3, 4, 4), high=(16, 17, 7))]})
    expected = np.zeros(volume.shape, np.uint8)
    expected[5:15, 6:16, 4:8] = 7
    assert np.array_equal(found.labelmap, expected) and found.slices == [4, 5, 6, 7]


def test_labels_and_several_boxes_of_one_stand_side_by_side(volume):
    low, high = (18, 4, 5), (30, 14, 5)
    found = fill(volume, {7: [Region(low=(3, 4, 5), high=(16, 17, 5))], 9: [Region(low=low, high=high)]})
    assert (found.labelmap == 7).sum() == 100 and (found.labelmap == 9).sum() == 48
    both = fill(volume, {7: [Region(low=(3, 4, 5), high=(16, 17, 5)), Region(low=low, high=high)]})
    assert (both.labelmap == 7).sum() == 148 and both.slices == [5] and both.scores == {7: pytest.approx(0.9)}


def test_a_slice_box_goes_over_what_was_followed_there(volume):
    deep, flat = Region(low=(3, 4, 3), high=(16, 17, 8)), Region(low=(5, 6, 5), high=(9, 15, 5))
    found = fill(volume, {7: [deep], 9: [flat]})
    assert (found.labelmap[:, :, 5] == 9).sum() == 50 and (found.labelmap[:, :, 5] == 7).sum() == 50
    assert not (found.labelmap[:, :, 4] == 9).any() and (found.labelmap[:, :, 4] == 7).sum() == 100


def test_nothing_is_made_of_no_boxes(volume):
    found = fill(volume, {7: []})
    assert not found.labelmap.any() and found.slices == [] and found.scores == {}
