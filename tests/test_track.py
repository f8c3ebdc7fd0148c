"""Objects through volumes by an engine's memory, which is right by eye: when it is used, and when it ends."""

import nibabel as nib
import nrrd
import numpy as np
import pytest

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.base import Encoding
from sam_infer.library import ImageLibrary
from sam_infer.stoprule import StopRule
from sam_infer.tasks.click import ClickInfer
from sam_infer.types import Candidates
from tests.conftest import ball
from tests.fakes import RememberingEngine

SHAPE = (60, 50, 30)
BALL = ball(SHAPE, (20, 15, 14), 9)
OTHER = ball(SHAPE, (45, 35, 14), 8)
#: What the stop rule lets through: its slices of a few pixels end it.
SEEN = BALL & (BALL.sum(axis=(0, 1)) >= StopRule().min_pixels)
WINDOW = {"window_level": 100, "window_width": 200}


@pytest.fixture
def engine():
    return RememberingEngine()


@pytest.fixture
def ct(tmp_path):
    """Two bright balls in water."""
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(np.where(BALL | OTHER, 200, 0).astype(np.int16), np.diag([1, 1, 2.5, 1])), path)
    return str(path)


@pytest.fixture
def ask(engine, ct):
    task = ClickInfer(encoder=SliceEncoder(engine=engine), library=ImageLibrary(limit=1 << 30), dimension=3)

    def call(**request):
        path, params = task({"image": ct, "result_extension": ".nrrd", **WINDOW, **request})
        return nrrd.read(path)[0] > 0, params

    return call


def test_memory_follows_the_object_both_ways_and_nothing_else_is_decoded(ask, engine):
    found, params = ask(foreground=[[20, 15, 12]])
    np.testing.assert_array_equal(found, SEEN)
    assert engine.paths == [(range(13, 30), [12], 30), (range(11, -1, -1), [12], 30)]
    assert len(engine.decoded) == 1, "the prompted slice"
    assert set(params["propagation"].values()) == {"vanished"}


def test_only_slices_up_to_the_objects_end_are_encoded_and_each_once(ask, engine):
    found, _ = ask(foreground=[[20, 15, 12]])
    visited = int(found.any(axis=(0, 1)).sum()) + 2  # and the first one beyond, at either end
    assert engine.encoded == visited
    ask(foreground=[[21, 15, 12]])
    assert engine.encoded == visited, "features come from the cache"


def test_every_prompted_slice_is_remembered_on_every_walk(ask, engine):
    found, _ = ask(foreground=[[20, 15, 10], [20, 15, 18]])
    np.testing.assert_array_equal(found, SEEN)
    assert [seeds for _, seeds, _ in engine.paths] == [[10, 18]] * 4
    assert {path.start for path, _, _ in engine.paths} == {9, 11, 17, 19}


def test_bounds_hold(ask, engine):
    found, params = ask(roi=[10, 30, 5, 25, 12, 16])
    np.testing.assert_array_equal(np.flatnonzero(found.any(axis=(0, 1))), range(12, 17))
    assert set(params["propagation"].values()) == {"roi"}
    assert all(path and set(path) <= set(range(12, 17)) for path, _, _ in engine.paths)


def test_background_clicks_on_the_way_are_heeded(ask, engine):
    """The box holds both balls on slice 14; a background click takes one out from slice 17 on."""
    found, _ = ask(roi=[5, 58, 2, 48, 14, 14], background=[[45, 35, 17]])
    assert found[45, 35, 14:17].all() and not found[45, 35, 17:].any()
    np.testing.assert_array_equal(found & BALL, SEEN)


@pytest.mark.parametrize(
    ("mask", "iou", "reason"), [(0, 0.9, "vanished"), (1, 0.9, "other intensities"), (None, 0.1, "uncertain")]
)
def test_the_stop_rule_ends_a_walk(ask, engine, monkeypatch, mask, iou, reason):
    """From slice 16 on memory loses the object, floods the slice, or is not sure any more."""
    track = engine.track

    def failing(path, **arguments):
        for k, found in track(path, **arguments):
            logits = found.logits if k < 16 or mask is None else np.full_like(found.logits, mask * 10 - 5.0)
            quality = found.iou if k < 16 else np.array([iou], np.float32)
            yield k, Candidates(logits=logits, iou=quality)

    monkeypatch.setattr(engine, "track", failing)
    found, params = ask(foreground=[[20, 15, 14]])
    assert np.flatnonzero(found.any(axis=(0, 1))).max() == 15
    assert params["propagation"]["16"] == reason


def test_memory_sees_whole_slices_also_where_the_prompted_one_is_zoomed(ask, engine, monkeypatch):
    monkeypatch.setattr(engine, "encoding", Encoding(side=30, cheap=True, device="cpu"))
    sizes, encode = [], engine.encode
    monkeypatch.setattr(engine, "encode", lambda image: (sizes.append(image.shape), encode(image))[1])
    found, _ = ask(roi=[12, 28, 7, 23, 14, 14])
    assert sizes[0] != SHAPE[1::-1], "the box is decoded from a crop"
    assert set(sizes[1:]) == {SHAPE[1::-1]}
    others = np.arange(SHAPE[2]) != 14  # on which the box cuts two pixels off
    np.testing.assert_array_equal(found[..., others], SEEN[..., others])


def test_an_existing_mask_is_corrected_by_prompts(ask, engine, tmp_path):
    both = (BALL | OTHER).astype(np.uint8)
    nib.save(nib.Nifti1Image(both, np.diag([1, 1, 2.5, 1])), tmp_path / "mask.nii.gz")
    found, _ = ask(background=[[45, 35, 14]], label_file=str(tmp_path / "mask.nii.gz"))
    assert not engine.paths
    assert not found[45, 35, 14]
