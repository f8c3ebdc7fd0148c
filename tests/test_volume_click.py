"""Objects through volumes: axes, several prompted slices, what a further click walks anew."""

import nibabel as nib
import numpy as np
import pytest

from sam_infer.axes import parse_axis, turned_image
from sam_infer.click import click_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.follow import Follower
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary
from sam_infer.prompts.request import parse_clicks
from sam_infer.propagate import propagate
from sam_infer.step import decoded_step, mask_step
from sam_infer.stoprule import StopRule
from sam_infer.tasks.click import ClickInfer
from sam_infer.types import Candidates, Prompts
from sam_infer.volumehistory import ENTRY, VolumeHistory
from sam_infer.volumes import Image
from tests.conftest import ball
from tests.fakes import RememberingEngine, ThresholdEngine

SHAPE = (60, 50, 40)
CENTRE = (28, 24, 20)
#: An egg: its semi-axes differ, so that mixed-up axes show.
EGG = sum(((x - c) / r) ** 2 for x, c, r in zip(np.indices(SHAPE), CENTRE, (18, 13, 9), strict=True)) <= 1
WINDOW = Window(level=100, width=200)


def make_image(mask=EGG, key="egg"):
    return Image(
        array=np.where(mask, 200, 0).astype(np.int16, order="F"),
        affine=np.diag([1.0, 1.2, 2.0, 1.0]),
        key=(key,),
        flat=False,
    )


def ask(image, request, *, engine=None, axis=2, history=None, encoder=None):
    clicks = parse_clicks(request, image.shape, axis=axis)
    return click_volume(
        image,
        clicks,
        encoder=encoder or SliceEncoder(engine=engine or ThresholdEngine()),
        window=WINDOW,
        mark=lambda _: None,
        axis=axis,
        history=history,
    )


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_gives_what_the_turned_volume_gives(axis):
    image = make_image()
    found = ask(image, {"foreground": [list(CENTRE)]}, axis=axis)
    array = np.ascontiguousarray(np.swapaxes(image.array, axis, 2))
    affine = turned_image(image, axis).affine
    turned = Image(array=array, affine=affine, key=("turned",), flat=False)
    point = list(CENTRE)
    point[axis], point[2] = point[2], point[axis]
    expected = ask(turned, {"foreground": [point]})
    np.testing.assert_array_equal(np.swapaxes(found.labelmap, axis, 2), expected.labelmap)
    assert found.labelmap.shape == SHAPE
    assert found.labelmap.flags.f_contiguous, "files are written without a copy"
    assert found.stops == expected.stops
    assert found.slices == [CENTRE[axis]]
    assert dice(found.labelmap > 0, EGG) > 0.97


def test_turning_copies_nothing_and_keeps_the_place_in_the_world():
    image = make_image()
    turned = turned_image(image, 0)
    assert np.shares_memory(turned.array, image.array)
    assert turned.key != image.key
    np.testing.assert_array_equal(turned.affine @ [3, 2, 1, 1], image.affine @ [1, 2, 3, 1])


def test_axes_do_not_share_embeddings():
    image, engine = make_image(), ThresholdEngine()
    encoder = SliceEncoder(engine=engine)
    ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder)
    before = engine.encoded
    ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, axis=0)
    assert engine.encoded > before + 10


@pytest.mark.parametrize(
    ("request_", "axis"),
    [
        ({}, 2),
        ({"axis": 1}, 1),
        ({"axis": "i"}, 0),
        ({"axis": "", "roi": [5, 5, 2, 9, 3, 8]}, 0),
        ({"roi": [1, 5, 4, 4, 3, 8]}, 1),
        ({"roi": [1, 5, 2, 4, 3, 3]}, 2),
        ({"roi": [1, 1, 2, 4, 3, 3]}, 2),
        ({"roi": [1, 5, 2, 4, 3, 8]}, 2),
        ({"roi": [1, 5, 4, 4, 3, 8], "axis": 2}, 2),
    ],
)
def test_the_axis_is_the_one_sent_or_the_thin_one(request_, axis):
    assert parse_axis(request_, SHAPE) == axis


@pytest.mark.parametrize("axis", [3, -1, True, "x", [0], 1.0])
def test_another_axis_is_refused(axis):
    with pytest.raises(InputError, match="axis"):
        parse_axis({"axis": axis}, SHAPE)


def test_a_picture_has_one_axis():
    assert parse_axis({"roi": [1, 1, 2, 8, 0, 0]}, (30, 20, 1)) == 2
    with pytest.raises(InputError, match="axis = 0"):
        parse_axis({"axis": 0}, (30, 20, 1))


def test_a_thin_roi_is_a_box_on_its_own_axis():
    image = make_image()
    roi = [28, 28, 11, 37, 11, 29]
    found = ask(image, {"roi": roi}, axis=parse_axis({"roi": roi}, SHAPE))
    assert found.slices == [28]
    assert dice(found.labelmap > 0, EGG) > 0.97


def test_slice_counts_along_the_axis():
    with pytest.raises(InputError, match="0 to 49"):
        parse_clicks({"foreground": [[1, 1, 1]], "slice": 50}, SHAPE, axis=1)
    assert parse_clicks({"foreground": [[1, 1, 1]], "slice": 49}, SHAPE, axis=1).slice == 49


def test_several_slices_are_joined_and_the_gap_is_crossed_once_where_both_agree():
    engine = ThresholdEngine()
    found = ask(make_image(), {"foreground": [[28, 24, 17], [28, 24, 23]]}, engine=engine)
    assert dice(found.labelmap > 0, EGG) > 0.97
    assert found.slices == [17, 23]
    assert "met" in found.stops.values()
    assert found.decoded == len(engine.decoded)
    assert found.decoded <= np.count_nonzero(EGG.any(axis=(0, 1))) + 3


def test_a_gap_is_blended_by_distance_where_the_walks_differ():
    """An engine that keeps what it is shown, between a wide and a narrow square."""

    def keep(k, prompts):
        return [Candidates(logits=p.mask_logits[None], iou=np.array([0.9], np.float32)) for p in prompts]

    def square(k, half):
        mask = np.zeros((64, 64), bool)
        mask[32 - half : 32 + half, 32 - half : 32 + half] = True
        return mask_step(k, mask, iou=0.9)

    follower = Follower(
        size=(64, 64),
        decode=keep,
        values=lambda k: np.full((64, 64), 0.5, np.float32),
        clicks=lambda k: Prompts(),
        thickness=1.0,
        rule=StopRule(),
    )
    volume = propagate({4: square(4, 20), 12: square(12, 10)}, depth=16, follower=follower)
    areas = {k: step.area for k, step in volume.steps.items()}
    assert sorted(areas) == list(range(16))
    assert [areas[k] for k in range(4, 7)] == [1600] * 3
    assert [areas[k] for k in range(10, 13)] == [400] * 3


def test_a_step_keeps_nothing_of_its_slice_but_its_window():
    mask = np.zeros((400, 300), bool)
    mask[5:9, 5:9] = True
    logits = np.where(mask, np.float32(5), np.float32(-5))[None]
    found = Candidates(logits=logits, iou=np.ones(1, np.float32))
    for step in (mask_step(0, mask, iou=1.0), decoded_step(0, found)):
        assert step.area == 16
        assert step.mask.base is None
        assert step.logits.base is None
        assert step.nbytes < 300


class TestFurtherClicks:
    """Requests that continue one another."""

    def test_the_same_request_again_decodes_nothing(self):
        encoder, history = SliceEncoder(engine=ThresholdEngine()), VolumeHistory()
        image = make_image()
        first = ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, history=history)
        again = ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, history=history)
        np.testing.assert_array_equal(first.labelmap, again.labelmap)
        assert first.walked
        assert again.walked == []
        assert again.decoded == 0
        assert first.stops == again.stops

    def test_a_click_that_changes_nothing_walks_until_it_meets_the_earlier_answer(self):
        engine, history = ThresholdEngine(), VolumeHistory()
        encoder, image = SliceEncoder(engine=engine), make_image()
        first = ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, history=history)
        before = len(engine.decoded)
        clicks = {"foreground": [[28, 24, 20], [30, 24, 24]]}
        second = ask(image, clicks, encoder=encoder, history=history)
        np.testing.assert_array_equal(first.labelmap, second.labelmap)
        assert second.decoded == len(engine.decoded) - before
        assert second.decoded <= 3 < first.decoded, "its own slice, and one on either side"
        assert 24 in second.walked
        assert second.slices == [20, 24]

    def test_only_one_side_of_an_untouched_seed_is_walked(self):
        encoder, history = SliceEncoder(engine=ThresholdEngine()), VolumeHistory()
        image = make_image()
        ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, history=history)
        clicks = {"foreground": [[28, 24, 20], [2, 2, 26]]}
        found = ask(image, clicks, encoder=encoder, history=history)
        assert min(found.walked) > 20

    def test_a_background_click_ends_the_object_there_and_beyond(self):
        mask = EGG | (np.indices(SHAPE)[2] >= 29) & ball(SHAPE, (28, 24, 29), 4)
        image = make_image(mask, "leak")
        encoder, history = SliceEncoder(engine=ThresholdEngine()), VolumeHistory()
        clicks = {"foreground": [[28, 24, 20]]}
        leaked = ask(image, clicks, encoder=encoder, history=history)
        assert leaked.labelmap[:, :, 30].any()
        found = ask(image, {**clicks, "background": [[28, 24, 30]]}, encoder=encoder, history=history)
        assert not found.labelmap[:, :, 30:].any()
        np.testing.assert_array_equal(found.labelmap[:, :, :29], leaked.labelmap[:, :, :29])
        assert min(found.walked) >= 29
        assert found.slices == [20, 30]
        undone = ask(image, clicks, encoder=encoder, history=history)
        np.testing.assert_array_equal(undone.labelmap, leaked.labelmap)
        assert undone.decoded == 0

    def test_a_background_click_counts_on_a_slice_that_a_roi_prompted_before_a_point_elsewhere(self):
        mask = EGG | ball(SHAPE, (50, 40, 20), 5)
        encoder, history = SliceEncoder(engine=ThresholdEngine()), VolumeHistory()
        image = make_image(mask, "two")
        request = {"roi": [0, 59, 0, 49, 12, 28]}
        first = ask(image, request, encoder=encoder, history=history)
        assert first.slices == [20]
        assert first.labelmap[50, 40, 20]
        request["foreground"] = [[28, 24, 25]]
        ask(image, request, encoder=encoder, history=history)
        found = ask(image, {**request, "background": [[50, 40, 20]]}, encoder=encoder, history=history)
        assert not found.labelmap[50, 40, 20]
        assert found.labelmap[28, 24, 20]
        assert found.slices == [20, 25]

    def test_answers_that_are_empty_are_forgotten_too(self):
        encoder, history = SliceEncoder(engine=ThresholdEngine()), VolumeHistory(limit=4 * ENTRY)
        image = make_image()
        for n in range(5):
            found = ask(image, {"foreground": [[n, 3, 1]]}, encoder=encoder, history=history)
            assert not found.labelmap.any()
        assert not ask(image, {"foreground": [[4, 3, 1]]}, encoder=encoder, history=history).decoded
        assert ask(image, {"foreground": [[0, 3, 1]]}, encoder=encoder, history=history).decoded

    def test_another_window_or_axis_is_another_history(self):
        encoder, history = SliceEncoder(engine=ThresholdEngine()), VolumeHistory()
        image = make_image()
        ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, history=history)
        other = ask(image, {"foreground": [[28, 24, 20]]}, encoder=encoder, history=history, axis=1)
        assert other.decoded > 1


def test_the_task_tells_what_was_walked_and_removed(tmp_path):
    hu = np.where(EGG, 200, 0).astype(np.int16)
    hu[0, 0, 0] = -1000
    nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 2, 1])), tmp_path / "ct.nii.gz")
    task = ClickInfer(
        encoder=SliceEncoder(engine=ThresholdEngine()), library=ImageLibrary(limit=1 << 30), dimension=3
    )
    request = {
        "image": str(tmp_path / "ct.nii.gz"),
        "foreground": [list(CENTRE)],
        "window_level": 100,
        "window_width": 200,
        "axis": "j",
    }
    path, params = task(request)
    found = np.asanyarray(nib.load(path).dataobj)
    assert dice(found > 0, EGG) > 0.97
    assert params["axis"] == 1
    slices = np.flatnonzero(found.any(axis=(0, 2)))
    assert params["walked"] == [[slices[0], slices[-1]]]
    assert params["decoded_slices"] > 5
    assert params["removed_islands"] == {"components": 0, "voxels": 0}
    path, params = task({**request, "min_island_voxels": 10**6})
    assert params["empty"]
    assert params["removed_islands"] == {"components": 1, "voxels": int((found > 0).sum())}
    assert params["decoded_slices"] == 0


def test_a_correction_keeps_to_the_slices_of_a_roi():
    """The sent mask misses half of the egg's cylinder; the click gives it back, on the ROI's slices alone."""
    column = np.zeros(SHAPE, bool)
    column[10:40, 10:40, 5:35] = True
    image = make_image(column, "column")
    sent = column.copy()
    sent[25:40] = False
    roi = [10, 39, 10, 39, 17, 23]
    changed = {}
    for name, request in {"open": {}, "bounded": {"roi": roi}}.items():
        prompts = {"foreground": [[32, 25, 20]], "background": [[12, 12, 30]] if request else [], **request}
        clicks = parse_clicks(prompts, SHAPE, existing=sent)
        found = click_volume(
            image,
            clicks,
            encoder=SliceEncoder(engine=ThresholdEngine()),
            window=WINDOW,
            mark=lambda _: None,
        )
        changed[name] = np.flatnonzero(((found.labelmap > 0) ^ sent).any(axis=(0, 1))).tolist()
    assert changed["bounded"] == list(range(17, 24))
    assert set(changed["bounded"]) < set(changed["open"])


def test_an_engine_with_a_memory_follows_by_it():
    engine = RememberingEngine()
    encoder, history = SliceEncoder(engine=engine), VolumeHistory()
    image, clicks = make_image(), {"foreground": [[28, 24, 18], [28, 24, 22]]}
    found = ask(image, clicks, encoder=encoder, history=history)
    assert dice(found.labelmap > 0, EGG) > 0.999
    assert (range(23, 40), [18, 22], 40) in engine.paths
    assert {p.box for p in engine.decoded} == {None}, "no slice is decoded from its neighbour's box"
    again = ask(image, clicks | {"background": [[2, 2, 22]]}, encoder=encoder, history=history)
    np.testing.assert_array_equal(again.labelmap, found.labelmap)
    assert again.decoded <= 4
