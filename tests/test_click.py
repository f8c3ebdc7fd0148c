"""The click tasks over an engine that is right by eye: slices, boxes, propagation, corrections, errors."""

import re

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image as PilImage

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.history import ClickHistories
from sam_infer.library import ImageLibrary
from sam_infer.tasks.click import ClickInfer
from sam_infer.types import Candidates, Prompts
from tests.conftest import ball, disc, save_png
from tests.fakes import CoarseEngine, ThresholdEngine

SHAPE = (60, 50, 30)
BALL = ball(SHAPE, (20, 15, 14), 9)
OTHER = ball(SHAPE, (45, 35, 14), 8)


@pytest.fixture
def engine():
    return ThresholdEngine()


@pytest.fixture
def make(engine):
    def task(dimension):
        encoder = SliceEncoder(engine=engine)
        return ClickInfer(encoder=encoder, library=ImageLibrary(limit=1 << 30), dimension=dimension)

    return task


@pytest.fixture
def ct(tmp_path):
    """Two bright balls in water; int16 HU with air in a corner."""
    hu = np.where(BALL | OTHER, 200, 0).astype(np.int16)
    hu[0, 0, 0] = -1000
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 2.5, 1])), path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    """A bright disc, far from the diagonal of a picture that is not square."""
    grey = np.where(disc((40, 90), (70, 12), 8), 220, 30).astype(np.uint8)
    return str(save_png(tmp_path / "photo.png", grey))


WINDOW = {"window_level": 100, "window_width": 200}


def ask(task, image, **request):
    path, params = task({"image": image, "result_extension": ".nrrd", **request})
    return nrrd.read(path)[0], params


def test_click_on_a_picture_is_column_and_row(make, photo):
    mask, params = ask(make(2), photo, foreground=[[70, 12]], label="lesion")
    assert mask.shape == (90, 40, 1)
    np.testing.assert_array_equal(mask[:, :, 0].T > 0, disc((40, 90), (70, 12), 8))
    assert params["label_names"] == {"lesion": 1}
    assert params["slice"] == 0
    assert 0 < params["score"] <= 1


def test_a_3d_click_on_a_picture_answers_too(make, photo):
    mask, _ = ask(make(3), photo, foreground=[[70, 12, 0]])
    assert mask.sum() == disc((40, 90), (70, 12), 8).sum()


@pytest.mark.parametrize("axis", [0, "j"])
def test_another_axis_of_a_picture_is_refused(make, photo, axis):
    with pytest.raises(InputError, match=f"axis = {axis!r}: a 2D image has slices along axis 2 only"):
        ask(make(3), photo, foreground=[[70, 12]], axis=axis)
    ask(make(3), photo, foreground=[[70, 12]], axis=2)


def test_picture_reply_is_a_png_on_the_picture_by_default(make, photo):
    path, _ = make(2)({"image": photo, "foreground": [[70, 12]]})
    reply = np.asarray(PilImage.open(path))
    np.testing.assert_array_equal(reply > 0, disc((40, 90), (70, 12), 8))


def test_click_on_a_slice_fills_that_slice_only(make, ct):
    mask, params = ask(make(2), ct, foreground=[[20, 15, 14]], **WINDOW)
    np.testing.assert_array_equal(mask[:, :, 14] > 0, BALL[:, :, 14])
    assert mask.sum() == BALL[:, :, 14].sum()
    assert params["slice"] == 14
    assert set(params["latencies"]) >= {"load", "encode", "decode", "write", "total"}


def test_slice_0_is_a_slice_and_other_slices_points_are_counted_as_ignored(make, tmp_path):
    hu = np.zeros((20, 20, 4), np.int16)
    hu[5:9, 5:9, 0] = 200
    hu[12:15, 12:15, 2] = 200
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "a.nii")
    mask, params = ask(
        make(2), str(tmp_path / "a.nii"), foreground=[[6, 6, 0], [13, 13, 2]], slice=0, **WINDOW
    )
    assert mask[:, :, 0].sum() == 16
    assert mask.sum() == 16
    assert params["prompts"]["ignored_points"] == 1


def test_roi_alone_segments_its_middle_slice_in_2d(make, ct):
    mask, params = ask(make(2), ct, roi=[30, 10, 25, 5, 20, 8], **WINDOW)
    assert params["slice"] == 14
    np.testing.assert_array_equal(mask[:, :, 14] > 0, BALL[:, :, 14])


def test_3d_click_follows_the_object_both_ways_and_stops_where_it_ends(make, ct):
    mask, params = ask(make(3), ct, foreground=[[20, 15, 12]], **WINDOW)
    found, truth = mask > 0, BALL
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.98
    assert found[:, :, :12].any()
    assert found[:, :, 15:].any()
    assert not (found & OTHER).any()
    assert len(params["propagation"]) == 2


def test_a_box_on_one_slice_leaves_the_extent_open(make, ct):
    mask, _ = ask(make(3), ct, roi=[10, 30, 5, 25, 14, 14], **WINDOW)
    assert (mask > 0)[:, :, 8].any()
    assert not ((mask > 0) & OTHER).any()


def test_a_box_of_several_slices_bounds_the_object(make, ct):
    mask, params = ask(make(3), ct, roi=[10, 30, 5, 25, 12, 16], **WINDOW)
    slices = np.flatnonzero((mask > 0).any(axis=(0, 1)))
    np.testing.assert_array_equal(slices, range(12, 17))
    assert set(params["propagation"].values()) == {"roi"}


@pytest.mark.parametrize("more", [{}, {"boxes": [[11, 29, 6, 24, 14, 14]]}, {"axis": "i"}])
def test_a_box_of_several_slices_bounds_the_object_along_every_axis(make, ct, more):
    region = np.zeros(SHAPE, bool)
    region[14:24, 11:31, 12:17] = True
    mask, _ = ask(make(3), ct, roi=[14, 23, 11, 30, 12, 16], **more, **WINDOW)
    assert not (mask[~region] > 0).any()
    np.testing.assert_array_equal(mask[:, :, 14] > 0, BALL[:, :, 14] & region[:, :, 14])


def test_a_correction_changes_nothing_beyond_the_bounding_box(make, ct, tmp_path):
    sent = BALL.copy()
    sent[20:] = False
    nib.save(nib.Nifti1Image(sent.astype(np.uint8), np.diag([1, 1, 2.5, 1])), tmp_path / "m.nii")
    request = {"foreground": [[22, 15, 14]], "label_file": str(tmp_path / "m.nii"), **WINDOW}
    mask, _ = ask(make(3), ct, roi=[12, 24, 8, 22, 10, 18], **request)
    changed = np.argwhere((mask > 0) ^ sent)
    assert changed.min(axis=0).tolist()[:2] == [20, 8]
    assert changed.max(axis=0).tolist()[:2] == [24, 22]


@pytest.mark.parametrize("point", [[20, 15, 11], [20, 15, 17], [9, 15, 14], [20, 26, 14]])
def test_a_point_outside_a_bounding_box_is_refused(make, ct, point):
    with pytest.raises(InputError, match=rf"foreground = {re.escape(str(point))}: .*outside the roi"):
        ask(make(3), ct, roi=[10, 30, 5, 25, 12, 16], foreground=[[20, 15, 14], point], **WINDOW)
    ask(make(3), ct, roi=[10, 30, 5, 25, 12, 12], foreground=[point], **WINDOW)


def test_a_box_prompts_only_its_own_slices_in_2d(make, ct, engine):
    ask(make(2), ct, roi=[10, 30, 5, 25, 12, 16], foreground=[[20, 15, 18]], **WINDOW)
    assert {p.box for p in engine.decoded} == {None}
    ask(make(2), ct, roi=[10, 30, 5, 25, 12, 16], foreground=[[20, 15, 13]], **WINDOW)
    assert engine.decoded[-1].box == (10.0, 5.0, 30.0, 25.0)


def test_two_clicked_slices_meet_in_the_middle(make, ct, engine):
    mask, params = ask(make(3), ct, foreground=[[20, 15, 10], [20, 15, 18]], **WINDOW)
    assert ((mask > 0) ^ BALL)[:, :, 10:19].sum() <= 0.01 * BALL[:, :, 10:19].sum()
    assert list(params["propagation"].values()).count("met") >= 1
    carried = [p for p in engine.decoded if p.mask_logits is not None]
    assert len(carried) <= SHAPE[2], "no slice is decoded twice"


def test_a_background_click_on_the_way_is_heeded(make, ct, engine):
    """Its slice is no seed, but when the propagation comes by, the click is among the prompts."""
    ask(make(3), ct, foreground=[[20, 15, 12]], background=[[45, 35, 16]], **WINDOW)
    heeded = [p for p in engine.decoded if len(p.negative)]
    assert len(heeded) == 1
    np.testing.assert_array_equal(heeded[0].negative, [[45, 35]])
    assert heeded[0].box is not None
    assert heeded[0].mask_logits is not None


def test_existing_mask_is_corrected_not_replaced(make, ct, tmp_path):
    """The mask holds both balls; a background click takes one out, slice by slice, and keeps the other."""
    both = (BALL | OTHER).astype(np.uint8)
    nib.save(nib.Nifti1Image(both, np.diag([1, 1, 2.5, 1])), tmp_path / "mask.nii.gz")
    mask, params = ask(
        make(3), ct, background=[[45, 35, 14]], label_file=str(tmp_path / "mask.nii.gz"), **WINDOW
    )
    found = mask > 0
    assert params["prompts"]["existing_mask"]
    assert not found[45, 35, 14]
    np.testing.assert_array_equal(found & BALL, BALL)
    assert (found & OTHER).sum() < 0.2 * OTHER.sum()


def test_existing_mask_in_2d_is_a_prompt(make, photo, tmp_path):
    part = disc((40, 90), (70, 12), 4).astype(np.uint8)
    save_png(tmp_path / "part.png", part)
    mask, _ = ask(make(2), photo, foreground=[[76, 12]], label_file=str(tmp_path / "part.png"))
    np.testing.assert_array_equal(mask[:, :, 0].T > 0, disc((40, 90), (70, 12), 8))


def test_a_slice_is_encoded_once(make, ct, engine):
    task = make(2)
    ask(task, ct, foreground=[[20, 15, 14]], **WINDOW)
    _, params = ask(task, ct, foreground=[[21, 15, 14]], **WINDOW)
    assert engine.encoded == 1
    assert params["embedding_cached"]
    ask(task, ct, foreground=[[20, 15, 14]], window_level=0, window_width=400)
    assert engine.encoded == 2, "another window is another embedding"


def test_a_changed_file_never_meets_a_stale_entry(make, tmp_path):
    task = make(2)
    for position in (10, 25):
        hu = np.zeros((40, 40, 3), np.int16)
        hu[position : position + 5, 10:15] = 200
        nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "c.nii")
        mask, _ = ask(task, str(tmp_path / "c.nii"), foreground=[[position + 2, 12, 1]], **WINDOW)
        assert mask[position + 2, 12, 1] == 1
        assert mask.sum() == 25


def test_a_second_click_sees_the_first_ones_logits_and_undo_costs_nothing(make, ct, engine):
    task = make(2)
    first = {"foreground": [[20, 15, 14]], **WINDOW}
    ask(task, ct, **first)
    ask(task, ct, foreground=[[20, 15, 14], [45, 35, 14]], **WINDOW)
    assert [p.mask_logits is not None for p in engine.decoded] == [False, True]
    ask(task, ct, **first)
    assert len(engine.decoded) == 2


def test_what_is_kept_of_a_click_is_its_best_candidate_alone():
    rng = np.random.default_rng(0)
    found = Candidates(
        logits=rng.normal(size=(3, 4, 5)).astype(np.float32), iou=np.array([0.1, 0.9, 0.2], np.float32)
    )
    click = Prompts(points=np.array([[2, 1]], np.float32), point_labels=np.array([1]))
    kept = ClickHistories(limit=1 << 20).answer(("slice",), click, lambda prompts, before: found)
    np.testing.assert_array_equal(kept.logits, found.logits[1:2])
    assert kept.iou.tolist() == found.iou[1:2].tolist()
    assert not np.shares_memory(kept.logits, found.logits)
    assert not np.shares_memory(kept.iou, found.iou)


def test_a_click_on_a_sent_mask_keeps_what_it_is_not_about(make, ct, engine, monkeypatch, tmp_path):
    """The engine's answer drops the sent mask for something small; the click asks only for more."""
    sent = np.zeros(SHAPE, np.uint8)
    sent[5:25, 5:25, 14] = 1
    nib.save(nib.Nifti1Image(sent, nib.load(ct).affine), tmp_path / "sent.nii.gz")
    answer = np.full(SHAPE[1::-1], -5.0, np.float32)
    answer[34:37, 44:47] = 5.0
    found = Candidates(logits=answer[None], iou=np.array([0.9], np.float32))
    monkeypatch.setattr(engine, "decode", lambda embedding, prompts: [found])
    mask, _ = ask(make(2), ct, foreground=[[45, 35, 14]], label_file=str(tmp_path / "sent.nii.gz"), **WINDOW)
    sent[44:47, 34:37, 14] = 1
    np.testing.assert_array_equal(mask, sent)


@pytest.mark.parametrize("dimension", [2, 3])
def test_a_reply_says_which_part_was_encoded_by_itself(ct, dimension):
    """The box is a fifth of the slice; the engine sees 32 pixels of a side."""
    engine = CoarseEngine(side=32)
    encoder, library = SliceEncoder(engine=engine), ImageLibrary(limit=1 << 30)
    task = ClickInfer(encoder=encoder, library=library, dimension=dimension)
    box = {"roi": [14, 26, 9, 21, 7, 7], **WINDOW}
    _, params = ask(task, ct, **box)
    x0, y0, x1, y1 = params["crop"]
    assert x0 <= 14 < 26 <= x1
    assert y0 <= 9 < 21 <= y1
    assert set(engine.shapes[:3]) == {(y1 - y0 + 1, x1 - x0 + 1)}, "neighbouring slices follow"
    _, params = ask(task, ct, **box, zoom=False)
    assert params["crop"] is None
    assert max(engine.shapes) == SHAPE[1::-1]


def test_readers_with_different_clicks_do_not_meet(make, ct):
    task = make(2)
    left, _ = ask(task, ct, foreground=[[20, 15, 14]], **WINDOW)
    right, _ = ask(task, ct, foreground=[[45, 35, 14]], **WINDOW)
    again, _ = ask(task, ct, foreground=[[20, 15, 14]], **WINDOW)
    assert not (left & right).any()
    np.testing.assert_array_equal(left, again)


def test_empty_answer_names_no_label(make, ct):
    mask, params = ask(make(2), ct, foreground=[[2, 40, 3]], **WINDOW)
    assert not mask.any()
    assert params["label_names"] == {}
    assert params["empty"]


def test_viewers_habits_are_accepted(make, ct):
    """Empty roi list, empty window fields, -1 slice, single bare point, extra keys."""
    mask, _ = ask(
        make(2),
        ct,
        foreground=[20, 15, 14],
        background=[],
        roi=[],
        slice=-1,
        window_level="",
        window_width="",
        restore_label_idx=False,
        client_id="x",
        pylab=True,
    )
    assert mask[20, 15, 14]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "foreground = None: nothing says where"),
        ({"foreground": [], "background": [[1, 1, 1]]}, "foreground"),
        ({"foreground": [[60, 0, 0]]}, r"foreground = \[60"),
        ({"foreground": [[1, 1, 1]], "slice": 30}, "slice = 30: send a slice index from 0 to 29"),
        ({"foreground": [[1, 1, 1]], "slice": "two"}, "slice = 'two'"),
        ({"foreground": [[1, 1, 1]], "slice": 1.5}, "slice = 1.5"),
        ({"foreground": [[1, 1, 1]], "slice": True}, "slice = True"),
        ({"foreground": [[1, 1, 1]], "slice": [1]}, r"slice = \[1\]"),
        ({"foreground": [[1, 1, 1], [1, 1, 2]]}, r"slice = None: the prompts lie on slices \[1, 2\]"),
        ({"foreground": [[1, 1, 1]], "slice": 5}, "slice 5 has no foreground point"),
        ({"foreground": [[1, 1, 1]], "window_level": 40}, "window_width"),
        ({"foreground": [[1, 1, 1]], "window_level": 40, "window_width": -1}, "window_width"),
        ({"foreground": [[1, 1, 1]], "window_level": "a", "window_width": "b"}, "two numbers"),
        ({"foreground": [[1, 1, 1]], "window_level": [1], "window_width": 5}, "window_level"),
        ({"foreground": [[1, 1, 1]], "label": ["a"]}, "label"),
        ({"foreground": [[1, 1, 1]], "zoom": "near"}, "zoom = 'near': send true, false"),
        ({"foreground": [[1, 1, 1]], "zoom": 2}, "zoom = 2"),
        ({"foreground": [[1, 1, 1]], "result_extension": ".exe"}, "result_extension"),
        ({"foreground": [[1, 1, 1]], "result_extension": ".png"}, "result_extension"),
    ],
)
def test_bad_requests_say_what_to_do(make, ct, request_, message):
    with pytest.raises(InputError, match=message):
        make(2)({"image": ct, **request_})


def test_background_clicks_alone_are_no_object_in_3d(make, ct):
    with pytest.raises(InputError, match="foreground"):
        make(3)({"image": ct, "background": [[1, 1, 1]]})


def test_config_never_hides_a_prompt(make):
    """3D Slicer lets config keys override prompts of the same name."""
    assert not set(make(2).info()["config"]) & {"foreground", "background", "roi", "slice", "label"}
