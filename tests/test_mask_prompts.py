"""Cleaning masks and turning them into prompts, against scipy and scikit-image."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import label as label_parts
from skimage.measure import regionprops
from skimage.morphology import dilation as grey_dilation

from sam_infer.geometry import innermost
from sam_infer.prompts.masks import (
    best_component,
    cleaned,
    cleaned_labelmap,
    dilated,
    large_parts,
    mask_prompts,
    parts_of,
    volume_prompts,
)
from tests.conftest import ball, disc


def field(seed, shape, sigma=2.0):
    """A smooth field of 0 to 1 with many parts above 0.5."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


@pytest.mark.parametrize("shape", [(60, 70), (24, 20, 16)])
def test_the_component_with_the_highest_mean_stays_and_the_largest_of_hard_masks(shape):
    p = field(1, shape)
    mask = p > 0.65
    parts = label_parts(mask, connectivity=len(shape))
    regions = regionprops(parts, intensity_image=p)
    surest = parts == max(regions, key=lambda r: r.intensity_mean).label
    largest = parts == max(regions, key=lambda r: r.area).label
    assert len(regions) > 3 and not np.array_equal(surest, largest), "the two rules must differ here"
    assert np.array_equal(best_component(mask, p), surest)
    assert np.array_equal(best_component(mask, (255 * p).astype(np.uint8)), surest)
    assert np.array_equal(cleaned(p[None], threshold=0.65)[0], surest)
    assert np.array_equal(best_component(mask), largest)
    assert not best_component(np.zeros(shape, bool), p).any()


def test_parts_that_share_a_corner_are_one():
    mask = np.zeros((6, 6), bool)
    mask[1, 1] = mask[2, 2] = mask[4, 4] = True
    assert np.argwhere(best_component(mask, np.where(mask, 0.7, 0))).tolist() == [[1, 1], [2, 2]]


def test_cleaning_takes_classes_one_by_one_and_widens_only_when_asked():
    p = np.stack([field(2, (40, 50)), field(3, (40, 50)), np.full((40, 50), 0.5, np.float32)])
    plain, wide = cleaned(p), cleaned(p, dilation=8)
    assert plain.shape == p.shape and plain.dtype == bool and not plain[2].any() and not wide[2].any()
    for n in range(2):
        assert label_parts(plain[n], connectivity=2).max() == 1
        assert np.array_equal(wide[n], grey_dilation(plain[n].astype(np.uint8), np.ones((8, 8))) > 0)
    assert (cleaned(p, threshold=0.8).sum() < plain.sum()) and cleaned(
        np.zeros((0, 4, 4), np.float32)
    ).size == 0


@pytest.mark.parametrize("width", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(30, 25), (12, 10, 9)])
def test_dilation_is_that_of_a_flat_square(width, shape):
    mask = np.random.default_rng(width).random(shape) > 0.98
    wanted = ndimage.binary_dilation(mask, np.ones((width,) * len(shape))) if width else mask
    assert np.array_equal(dilated(mask, width), wanted)
    with pytest.raises(ValueError, match="dilation = -1"):
        dilated(mask, -1)


def test_a_label_map_is_cleaned_over_slices():
    labels = np.zeros((30, 28, 12), np.uint8)
    sure = np.zeros(labels.shape, np.uint8)
    large, small = ball(labels.shape, (9, 9, 5), 5), ball(labels.shape, (22, 20, 6), 3)
    labels[large], sure[large] = 4, 150
    labels[small], sure[small] = 4, 240
    other = ball(labels.shape, (9, 22, 5), 3)
    labels[other], sure[other] = 9, 200
    by_mean, by_size = cleaned_labelmap(labels, sure), cleaned_labelmap(labels)
    assert np.array_equal(by_mean == 4, small) and np.array_equal(by_size == 4, large)
    assert np.array_equal(by_mean == 9, other) and by_mean.flags.f_contiguous
    assert not cleaned_labelmap(np.zeros((3, 3, 3), np.uint8)).any()


def test_box_and_centroid_are_those_of_regionprops():
    masks = {5: disc((60, 80), (20, 30), 11), 2: disc((60, 80), (55.4, 22.7), 9)}
    prompts = mask_prompts(masks)
    assert list(prompts) == [5, 2]
    for value, mask in masks.items():
        (region,) = regionprops(mask.astype(int))
        y0, x0, y1, x1 = region.bbox
        assert prompts[value].box == (x0, y0, x1 - 1, y1 - 1)
        assert prompts[value].positive == tuple(np.rint(region.centroid)[::-1])
        other = prompts[7 - value]
        assert prompts[value].negatives.tolist() == [list(other.positive)]
        assert prompts[value].negatives.dtype == np.float32


def test_seeds_lie_on_pixels_of_no_other_mask_and_the_centroid_may_lie_outside():
    ring = disc((50, 50), (25, 25), 20) & ~disc((50, 50), (25, 25), 12)
    overlapping = np.zeros((50, 50), bool)
    overlapping[5:45, 5:25] = True
    prompts = mask_prompts({1: ring})
    assert prompts[1].positive == (25.0, 25.0) and not ring[25, 25]
    inside = mask_prompts({1: ring}, seed="interior")[1].positive
    distance = ndimage.distance_transform_edt(np.pad(ring, 1))[1:-1, 1:-1]
    assert distance[int(inside[1]), int(inside[0])] == distance.max()
    both = mask_prompts({1: ring, 2: overlapping})
    for value, own in ((1, ring & ~overlapping), (2, overlapping & ~ring)):
        assert both[value].positive == tuple(np.rint(np.argwhere(own).mean(0))[::-1])
    assert both[1].box == prompts[1].box, "the box is of the whole mask"


def test_no_seed_without_a_pixel_of_its_own_and_empty_masks_are_absent():
    whole, half = np.ones((8, 10), bool), np.zeros((8, 10), bool)
    half[:, :5] = True
    prompts = mask_prompts({1: whole, 2: half, 3: np.zeros((8, 10), bool)})
    assert list(prompts) == [1, 2]
    assert prompts[2].positive is None and prompts[2].negatives.tolist() == [list(prompts[1].positive)]
    assert prompts[1].negatives.shape == (0, 2) and prompts[2].box == (0, 0, 4, 7)
    assert mask_prompts({}) == {} == mask_prompts({3: np.zeros((8, 10), bool)})


def test_in_a_volume_the_region_and_the_seeds_are_those_of_regionprops():
    labels = np.zeros((40, 36, 20), np.uint8)
    labels[ball(labels.shape, (10, 12, 7), 5)] = 3
    labels[ball(labels.shape, (28, 20, 11), 6)] = 8
    prompts = volume_prompts(labels)
    assert sorted(prompts) == [3, 8]
    for region in regionprops(labels):
        found = prompts[region.label]
        assert found.region.low == region.bbox[:3]
        assert found.region.high == tuple(n - 1 for n in region.bbox[3:])
        assert found.positive == tuple(np.rint(region.centroid))
        assert found.negatives.tolist() == [list(prompts[11 - region.label].positive)]
    assert volume_prompts(labels, seed="interior")[3].positive == (10, 12, 7)
    assert volume_prompts(np.zeros((2, 2, 2), np.uint8)) == {}


def test_the_innermost_pixel_may_touch_the_border():
    assert innermost(np.ones((1, 1), bool)) == (0, 0)
    assert innermost(np.ones((5, 7), bool)) == (2, 2)


def test_parts_keep_all_but_the_small_ones():
    mask = np.zeros((20, 30), bool)
    mask[2:8, 2:8] = mask[2:8, 20:26] = True
    mask[15, 15] = True
    assert np.array_equal(large_parts(mask), mask & ~(np.arange(20) == 15)[:, None])
    assert [part.sum() for part in parts_of(mask)] == [36, 36, 1]
    labels = np.asfortranarray((mask * 3).T[:, :, None].astype(np.uint8))
    assert (cleaned_labelmap(labels, keep="parts") == 3).sum() == 72
    assert (cleaned_labelmap(labels) == 3).sum() == 36
    assert cleaned(mask[None].astype(np.float32), keep="parts").sum() == 72
    assert not large_parts(np.zeros((3, 3), bool)).any()
