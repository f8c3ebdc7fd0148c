"""Boxes on several slices, lassos, and masks as prompts: how they are read, and what they give."""

import nibabel as nib
import nrrd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.prompts.boxes import MAX_BOXES, parse_boxes
from sam_infer.prompts.lasso import MAX_POLYGONS, MAX_VERTICES, parse_lasso
from sam_infer.prompts.request import parse_clicks
from sam_infer.tasks.click import ClickInfer
from tests.conftest import ball, disc
from tests.fakes import ThresholdEngine

SHAPE = (60, 50, 30)
BALL = ball(SHAPE, (20, 15, 14), 9)
OTHER = ball(SHAPE, (45, 35, 14), 8)
WINDOW = {"window_level": 100, "window_width": 200}
FLAT = (40, 30, 1)


def circle(x, y, radius, *, k=None, corners=24):
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    found = [[x + radius * np.cos(a), y + radius * np.sin(a)] for a in angles]
    return found if k is None else [[*corner, k] for corner in found]


def test_boxes_are_sorted_clipped_and_by_slice():
    found = parse_boxes([[9, 2, 3, 99, 4, 4], [1, 2, 1, 2, 0, 0]], SHAPE)
    assert found == {4: (2.0, 3.0, 9.0, 49.0), 0: (1.0, 1.0, 2.0, 2.0)}
    assert parse_boxes([[1, 2, 3, 4]], FLAT) == {0: (1.0, 3.0, 2.0, 4.0)}
    assert parse_boxes([], SHAPE) == parse_boxes(None, SHAPE) == parse_boxes("", SHAPE) == {}


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[1, 2, 1, 2, 3, 5]], "each box lies on one slice"),
        ([[1, 2, 1, 2, 3, 3], [5, 6, 5, 6, 3, 3]], "slice 3 has a box already"),
        ([[1, 2, 1, 2]], "boxes"),
        ([1, 2, 1, 2, 3, 3], "boxes = 1"),
        ([[60, 70, 1, 2, 3, 3]], "outside the image"),
        ([[float("nan"), 2, 1, 2, 3, 3]], "finite"),
        ("all", "boxes = 'all'"),
        ({"a": 1}, "boxes"),
        ([[1, 2, 1, 2, 3, 3]] * (MAX_BOXES + 1), f"{MAX_BOXES + 1} boxes"),
    ],
)
def test_bad_boxes_say_what_to_do(boxes, message):
    with pytest.raises(InputError, match=message):
        parse_boxes(boxes, SHAPE)


def test_a_lasso_is_what_it_encloses_and_its_innermost_point():
    found = parse_lasso("lasso", [circle(20, 12, 6.2)], FLAT)
    expected = disc((30, 40), (20, 12), 6.1)
    assert (found.masks[0] ^ expected).sum() < 0.05 * expected.sum()
    np.testing.assert_allclose(found.points, [[20, 12, 0]], atol=1)


def test_lassos_of_one_slice_add_up_and_a_bare_or_closed_one_is_taken():
    twice = parse_lasso("lasso", [circle(10, 12, 4, k=3), circle(40, 30, 5, k=3)], SHAPE)
    assert list(twice.masks) == [3]
    assert len(twice.points) == 2
    assert twice.masks[3][12, 10]
    assert twice.masks[3][30, 40]
    bare = circle(10, 12, 4, k=3)
    np.testing.assert_array_equal(
        parse_lasso("lasso", bare, SHAPE).masks[3], parse_lasso("lasso", [[*bare, bare[0]]], SHAPE).masks[3]
    )


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        ([[[1, 1, 0], [5, 5, 0]]], "3 vertices or more"),
        ([[[1, 1, 0], [5, 5, 0], [1, 1, 0]]], "3 vertices or more"),
        ([[[1, 1, 0], [9, 9, 0], [9, 1, 0], [1, 9, 0]]], "crosses itself"),
        ([[[1, 1, 0], [9, 9, 0], [9, 1, 1]]], "lies on one slice.*from 0 to 1"),
        ([[[1, 1, 0], [9, 60, 0], [9, 1, 0]]], r"lasso = \[9.0, 60.0, 0.0\]: the vertex lies outside"),
        ([[[1, 1, -1], [9, 9, -1], [9, 1, -1]]], "outside"),
        ([[[1, 1, 0], [9, float("nan"), 0], [9, 1, 0]]], "as"),
        ([[[1.2, 1.2, 0], [1.4, 1.2, 0], [1.3, 1.4, 0]]], "encloses no voxel"),
        ([[[1, 1], [9, 9], [9, 1]]], "voxel indices"),
        ([["a"]], "lasso"),
        ([[]], "lasso"),
        ([None], "lasso"),
        ("round", "lasso = 'round'"),
        ([10**400], "lasso"),
        ([[[1, 1, 0]] * (MAX_VERTICES + 1)], "at most"),
        ([circle(10, 12, 4, k=3, corners=1400)] * 3, f"4200 vertices.*at most {MAX_VERTICES}"),
        ([circle(10, 12, 4, k=3, corners=3)] * (MAX_POLYGONS + 1), f"at most {MAX_POLYGONS}"),
    ],
)
def test_bad_lassos_say_what_to_do(polygons, message):
    with pytest.raises(InputError, match=message):
        parse_lasso("lasso", polygons, SHAPE)


junk = st.recursive(
    st.sampled_from([None, True, "", "a", 0, 1, 3, -1, 2.5, 10**400, float("nan"), float("inf")]),
    lambda inner: st.lists(inner, max_size=7),
    max_leaves=10,
)
KEYS = ("foreground", "background", "roi", "boxes", "lasso", "lasso_background", "slice", "mask")


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, junk)), st.sampled_from([(4, 3, 2), (4, 3, 1)]))
def test_any_request_is_read_or_refused(request_, shape):
    try:
        clicks = parse_clicks(request_, shape, existing=np.ones(shape, bool))
        assert all(0 <= k < shape[2] for k in clicks.slices_with_prompts())
    except InputError as error:
        assert 400 <= error.status < 500


@pytest.fixture
def engine():
    return ThresholdEngine()


@pytest.fixture
def ask(engine, tmp_path):
    """A function that asks a click task about a CT of two bright balls in water."""
    hu = np.where(BALL | OTHER, 200, 0).astype(np.int16)
    hu[0, 0, 0] = -1000
    affine = np.diag([1, 1, 2.5, 1])
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    encoder, library = SliceEncoder(engine=engine), ImageLibrary(limit=1 << 30)

    def answer(dimension, *, existing=None, **request):
        if existing is not None:
            nib.save(nib.Nifti1Image(existing.astype(np.uint8), affine), tmp_path / "mask.nii.gz")
            request["label_file"] = str(tmp_path / "mask.nii.gz")
        task = ClickInfer(encoder=encoder, library=library, dimension=dimension)
        path, params = task(
            {"image": str(tmp_path / "ct.nii.gz"), "result_extension": ".nrrd", **WINDOW, **request}
        )
        return nrrd.read(path)[0] > 0, params

    return answer


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


BOXES = [[12, 28, 7, 23, 10, 10], [12, 28, 7, 23, 18, 18]]


def test_boxes_prompt_their_slices(ask, engine):
    mask, params = ask(3, boxes=BOXES)
    assert params["slices"] == [10, 18]
    assert dice(mask, BALL) > 0.98
    assert "met" in params["propagation"].values()
    assert params["prompts"]["boxes"] == BOXES


def test_a_roi_beside_boxes_bounds_the_object_only(ask):
    mask, params = ask(3, boxes=BOXES, roi=[0, 59, 0, 49, 9, 20])
    assert params["slices"] == [10, 18]
    assert set(np.flatnonzero(mask.any(axis=(0, 1)))) <= set(range(9, 21))
    with pytest.raises(InputError, match="slice 18 lies outside the roi's slices 9 to 12"):
        ask(3, boxes=BOXES, roi=[0, 59, 0, 49, 9, 12])


def test_a_2d_request_takes_the_box_of_its_slice(ask):
    mask, params = ask(2, boxes=BOXES[:1])
    np.testing.assert_array_equal(mask[:, :, 10], BALL[:, :, 10])
    assert params["slice"] == 10
    assert ask(2, boxes=BOXES, slice=18)[1]["slice"] == 18
    with pytest.raises(InputError, match=r"slices \[10, 18\]"):
        ask(2, boxes=BOXES)


def test_a_lasso_prompts_with_all_that_it_says(ask, engine):
    mask, params = ask(2, lasso=[circle(20, 15, 10, k=14)])
    np.testing.assert_array_equal(mask[:, :, 14], BALL[:, :, 14])
    assert params["prompts"]["rough_masks"] == [14]
    (shown,) = engine.decoded
    assert shown.mask_logits is not None
    assert shown.box == (10.0, 5.0, 30.0, 25.0)
    assert not len(shown.points)


def test_a_lasso_through_the_volume(ask):
    mask, params = ask(3, lasso=[circle(20, 15, 10, k=14)])
    assert params["slices"] == [14]
    assert dice(mask, BALL) > 0.98


def test_a_background_lasso_takes_its_part_out(ask, engine):
    around = [[[5, 2, 14], [55, 2, 14], [55, 47, 14], [5, 47, 14]]]
    mask, _ = ask(2, lasso=around, lasso_background=[circle(45, 35, 10, k=14)])
    np.testing.assert_array_equal(mask[:, :, 14], BALL[:, :, 14])


def test_a_mask_alone_is_refined_through_the_volume(ask):
    part = np.zeros(SHAPE, bool)
    part[15:26, 11:20, 13:16] = True
    mask, params = ask(3, existing=part)
    assert params["slices"] == [13, 14, 15]
    assert not params["prompts"]["existing_mask"]
    assert dice(mask, BALL) > 0.98


def test_what_a_mask_is_for_may_be_said(ask):
    both = BALL | OTHER
    corrected, params = ask(3, existing=both, background=[[45, 35, 14]])
    assert params["prompts"]["existing_mask"]
    assert (corrected & BALL).sum() == BALL.sum()
    refined, params = ask(3, existing=BALL & (np.arange(30) == 14), foreground=[[45, 35, 14]], mask="prompt")
    assert not params["prompts"]["existing_mask"]
    assert dice(refined, both) > 0.95
    with pytest.raises(InputError, match="mask = 'both'"):
        ask(3, existing=both, mask="both")


@pytest.mark.parametrize("axis", [0, 1])
def test_boxes_and_lassos_lie_across_any_axis(axis):
    shape = list(SHAPE)
    shape[axis], shape[2] = shape[2], shape[axis]

    def turned(values):
        values = list(values)
        values[axis], values[2] = values[2], values[axis]
        return values

    bounds = turned([(2, 9), (3, 7), (4, 4)])
    box = [edge for pair in bounds for edge in pair]
    assert parse_boxes([box], tuple(shape), axis) == parse_boxes([[2, 9, 3, 7, 4, 4]], SHAPE)
    there = parse_lasso("lasso", [circle(20, 12, 6.2, k=3)], SHAPE)
    found = parse_lasso("lasso", [[turned(p) for p in circle(20, 12, 6.2, k=3)]], tuple(shape), axis)
    assert list(found.masks) == [3] and np.array_equal(found.masks[3], there.masks[3])
    assert found.points.tolist() == [turned(there.points[0].tolist())]
