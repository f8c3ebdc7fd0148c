"""Scribbles: strokes to points, label maps to strokes, and masks that keep what was painted."""

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.prompts.scribbles import parse_scribbles
from sam_infer.prompts.strokes import stroke_points
from sam_infer.scribble import SEEDS
from sam_infer.tasks.scribble import ScribbleInfer
from sam_infer.walker import walker_logits
from tests.conftest import ball
from tests.fakes import CoarseEngine, ThresholdEngine
from tests.test_server import infer, parts

SHAPE = (60, 50, 30)
BALL = ball(SHAPE, (20, 15, 14), 9)
OTHER = ball(SHAPE, (45, 35, 14), 8)
WINDOW = {"window_level": 100, "window_width": 200}
BACK, FORE = 2, 3


def test_points_reach_every_stroke_and_its_ends():
    strokes = np.zeros((40, 60), bool)
    strokes[5:8, 5:45] = True
    strokes[30, 50] = True
    points = stroke_points(strokes, 4)
    assert len(points) == 4
    assert all(strokes[int(y), int(x)] for x, y in points)
    assert [50, 30] in points.tolist()
    assert points[:, 0].min() < 12
    assert np.ptp(points[points[:, 1] < 10][:, 0]) > 25


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 11)), max_size=40), st.integers(0, 9))
def test_points_are_painted_distinct_and_few(pixels, count):
    strokes = np.zeros((16, 12), bool)
    for y, x in pixels:
        strokes[y, x] = True
    points = stroke_points(strokes, count)
    assert len(points) <= count
    assert bool(len(points)) == bool(len(pixels) and count)
    assert len({tuple(p) for p in points.tolist()}) == len(points)
    assert all(strokes[int(y), int(x)] for x, y in points)


def test_the_walker_stops_at_edges_and_judges_nothing_far_away():
    image = np.zeros((300, 400), np.float32)
    image[100:140, 100:200] = 1
    foreground, background = np.zeros((2, *image.shape), bool)
    foreground[130, 120:130] = True
    background[80, 90:210] = True
    logits = walker_logits(image, foreground, background)
    assert (logits[102:138, 102:198] > 0).all()
    assert (logits[85:95, 95:205] < 0).all()
    assert (logits[280:] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (5, 300)])
def test_the_walker_bears_any_size(size):
    layers = np.zeros((2, *size), bool)
    layers[0, 0, 0] = layers[1, -1, -1] = True
    logits = walker_logits(np.zeros(size, np.float32), *layers)
    assert np.isfinite(logits).all()
    assert logits.shape == size


@pytest.fixture
def engine():
    return ThresholdEngine()


@pytest.fixture
def paint(engine, tmp_path):
    """A function that answers strokes {value: [index, ...]} on a CT of two bright balls in water."""
    hu = np.where(BALL | OTHER, 200, 0).astype(np.int16)
    hu[0, 0, 0] = -1000
    affine = np.diag([1, 1, 2.5, 1])
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    task = ScribbleInfer(encoder=SliceEncoder(engine=engine), library=ImageLibrary(limit=1 << 30))

    def answer(strokes, **request):
        painted = np.zeros(SHAPE, np.uint8)
        for value, where in strokes:
            painted[where] = value
        nib.save(nib.Nifti1Image(painted, affine), tmp_path / "painted.nii.gz")
        path, params = task(
            {
                "image": str(tmp_path / "ct.nii.gz"),
                "label_file": str(tmp_path / "painted.nii.gz"),
                "result_extension": ".nii",
                **WINDOW,
                **request,
            }
        )
        return np.asarray(nib.load(path).dataobj) > 0, params

    return answer


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


STROKE = (slice(15, 26), slice(14, 16), 14)


def test_a_stroke_fills_the_object_through_the_volume(paint):
    mask, params = paint([(FORE, STROKE)])
    assert dice(mask, BALL) > 0.98
    assert params["slices"] == [14]
    assert params["propagation"]


def test_painted_slices_only(paint):
    mask, params = paint([(FORE, STROKE), (FORE, (20, 15, 16))], extent="slices")
    assert params["slices"] == [14, 16]
    expected = np.zeros_like(BALL)
    expected[:, :, [14, 16]] = BALL[:, :, [14, 16]]
    np.testing.assert_array_equal(mask, expected)
    assert params["prompts"]["foreground_voxels"] == 23


def test_what_is_painted_is_in_or_out_whatever_the_engine_says(paint):
    inside, outside = (20, slice(13, 18), 14), (slice(40, 44), slice(2, 5), 14)
    mask, _ = paint([(FORE, STROKE), (FORE, outside), (BACK, inside)])
    assert mask[outside].all()
    assert not mask[inside].any()


def test_points_along_one_slices_strokes_are_decoded_together(paint, engine):
    paint([(FORE, STROKE), (BACK, (45, slice(30, 40), 14))], extent="slices")
    assert len(engine.decoded) == 1
    assert len(engine.decoded[0].positive) > 3
    assert len(engine.decoded[0].negative) > 3


class Watched(CoarseEngine):
    """Notes the shape of all that it decodes from."""

    def __init__(self, **kwargs):
        super().__init__(16, **kwargs)
        self.looked = set()

    def decode(self, embedding, prompts):
        self.looked.add(tuple(embedding.image_size))
        return super().decode(embedding, prompts)


@pytest.mark.parametrize("extent", ["volume", "slices"])
@pytest.mark.parametrize("engine", [Watched(cheap=True), Watched(cheap=False)])
@pytest.mark.parametrize("so_far", [[], [(1, (slice(14, 21), slice(12, 18), 14))]])
def test_nothing_is_encoded_that_is_not_looked_at(paint, engine, extent, so_far):
    engine.shapes.clear()
    engine.looked.clear()
    roi = [] if so_far else [18, 22, 13, 17, 14, 14]
    paint([*so_far, (FORE, (slice(19, 23), 15, 14))], roi=roi, extent=extent)
    assert set(engine.shapes) == engine.looked


def test_a_stroke_across_all_slices_prompts_few_of_them(paint):
    mask, params = paint([(FORE, (20, 15, slice(6, 23)))])
    assert len(params["slices"]) == SEEDS
    assert params["slices"][0] == 6
    assert params["slices"][-1] == 22
    assert dice(mask, BALL) > 0.98


def test_the_roi_bounds_the_object_and_what_counts_as_painted(paint, engine):
    strokes = [(FORE, STROKE), (BACK, (45, 35, 14))]
    mask, _ = paint(strokes, roi=[14, 30, 10, 25, 12, 16])
    within = np.zeros_like(BALL)
    within[14:31, 10:26, 12:17] = True
    assert not (mask & ~within).any()
    assert (mask & BALL).sum() > 0.9 * (BALL & within).sum()
    assert all(not len(p.negative) for p in engine.decoded)
    with pytest.raises(InputError, match=r"roi = .*every foreground stroke lies outside"):
        paint(strokes, roi=[40, 50, 30, 40, 10, 20])


def test_a_roi_alone_is_a_box(paint):
    mask, _ = paint([], roi=[10, 30, 5, 25, 4, 24])
    assert dice(mask, BALL) > 0.98


@pytest.mark.parametrize("strokes", [[], [(FORE, STROKE)]])
def test_a_roi_of_one_slice_keeps_the_object_on_it(paint, engine, strokes):
    mask, params = paint(strokes, roi=[10, 30, 5, 25, 14, 14])
    np.testing.assert_array_equal(np.flatnonzero(mask.any(axis=(0, 1))), [14])
    assert params["propagation"] is None
    assert len(engine.decoded) == 1, "no slice is decoded for nothing"


def test_slicers_numbering_and_the_selected_segment(paint):
    """The panel numbers all segments, names the strokes' layers, and sends the segment so far."""
    info = [
        {"name": name, "id": n}
        for n, name in enumerate(
            ["spleen", "liver", "background", "background_scribbles", "foreground_scribbles"], start=1
        )
    ]
    part = BALL & (np.arange(30) >= 14)
    mask, params = paint(
        [(1, OTHER), (5, STROKE), (4, (45, 35, 14))],
        label_info=info,
        selected_label_name="liver",
        roi=[],
        client_id="user-xyz",
    )
    assert params["label_names"] == {"liver": 1}
    assert not params["prompts"]["existing_mask"]
    assert dice(mask, BALL) > 0.98
    mask, params = paint([(2, part)], label_info=info, selected_label_name="liver")
    assert params["prompts"]["existing_mask"]
    np.testing.assert_array_equal(mask, part)


def test_only_strokes_that_contradict_the_object_so_far_count(paint, engine):
    """The file shows strokes where they cover the object; a second press of the button changes nothing."""
    sent = (BALL | OTHER) & (np.arange(30) > 10)
    mask, params = paint([(1, sent), (FORE, STROKE), (BACK, (slice(30, 35), 2, 14))])
    np.testing.assert_array_equal(mask, sent)
    assert params["prompts"]["existing_mask"]
    assert (params["slices"], params["score"]) == ([], None)
    assert not engine.decoded


def test_a_background_stroke_takes_out_what_it_is_on_and_only_that(paint):
    mask, params = paint([(1, BALL | OTHER), (FORE, STROKE), (BACK, (slice(40, 50), 35, 14))])
    assert params["slices"] == [14]
    assert not (mask & OTHER)[:, :, 14].any()
    np.testing.assert_array_equal(mask & BALL, BALL)


def test_a_foreground_stroke_adds_what_it_is_on(paint):
    mask, params = paint([(1, BALL), (FORE, (slice(42, 48), 35, 14))])
    assert params["slices"] == [14]
    np.testing.assert_array_equal(mask[:, :, 14], (BALL | OTHER)[:, :, 14])
    np.testing.assert_array_equal(mask & BALL, BALL)


@pytest.mark.parametrize(
    ("strokes", "request_", "message"),
    [
        ([], {}, r"label = \[\]: nothing says where"),
        ([(BACK, STROKE)], {}, r"label = \[2\]: nothing says where"),
        ([(9, STROKE)], {}, "label = 9: not among"),
        ([(FORE, STROKE)], {"label_info": "x"}, "label_info = 'x'"),
        ([(FORE, STROKE)], {"label_info": [{"name": "foreground_scribbles"}]}, "label_info"),
        ([(FORE, STROKE)], {"label_info": [{"name": 1, "id": 1}]}, "label_info"),
        ([(FORE, STROKE)], {"label_info": [{"name": "a", "id": True}]}, "label_info"),
        ([(FORE, STROKE)], {"roi": [1]}, r"roi = \[1\]"),
        ([(FORE, STROKE)], {"extent": "all"}, "extent = 'all': choose one of volume, slices"),
        ([(FORE, STROKE)], {"extent": ["slices"]}, "extent"),
        ([(FORE, STROKE)], {"label": 3}, "label = 3"),
    ],
)
def test_bad_requests_say_what_to_do(paint, strokes, request_, message):
    with pytest.raises(InputError, match=message):
        paint(strokes, **request_)


def test_strokes_must_be_sent(paint):
    with pytest.raises(InputError, match="label = None: upload"):
        paint([(FORE, STROKE)], label_file=None)


junk = st.recursive(
    st.sampled_from([None, True, "", "a", "7", 0, 3, -1, 10**400, 2.5, float("nan"), float("inf")]),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["name", "id", "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional={"label_info": junk, "roi": junk}))
def test_any_request_is_read_or_refused(request_):
    painted = np.zeros((4, 3, 2), np.uint8)
    painted[1, 1, 1] = FORE
    try:
        assert parse_scribbles(request_, painted, selected="liver").foreground.shape == painted.shape
    except InputError as error:
        assert 400 <= error.status < 500


def test_over_rest(served):
    client, studies, _ = served
    painted = np.zeros((24, 20, 6), np.uint8)
    painted[5:9, 6, 2] = FORE
    nib.save(nib.Nifti1Image(painted, nib.load(studies / "ct.nii.gz").affine), studies.parent / "s.nii.gz")
    files = {"label": ("s.nii.gz", (studies.parent / "s.nii.gz").read_bytes())}
    reply = infer(client, "sam_scribble", files=files, label="liver", result_extension=".nii", **WINDOW)
    assert reply.status_code == 200, reply.text
    found = parts(reply)
    assert json.loads(found["params"])["label_names"] == {"liver": 1}
    voxels = np.frombuffer(found["image"][-24 * 20 * 6 :], np.uint8).reshape((24, 20, 6), order="F")
    assert voxels[4:10, 5:9, 1:5].all()
    assert voxels.sum() == 6 * 4 * 4
    assert infer(client, "sam_scribble", label="liver").status_code == 400
    assert client.get("/info/").json()["models"]["sam_scribble"]["type"] == "scribbles"
