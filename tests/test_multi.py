"""Clicks on several labels at once: masks that exclude each other, and values as each viewer takes them."""

import json

import nibabel as nib
import nrrd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.prompts.multi import parse_objects
from sam_infer.tasks.multi import MultiInfer
from sam_infer.tasks.numbering import numbered
from sam_infer.types import Candidates
from tests.conftest import ball
from tests.fakes import ThresholdEngine
from tests.test_server import infer, parts

SHAPE = (60, 50, 30)
BALL = ball(SHAPE, (20, 15, 14), 9)
OTHER = ball(SHAPE, (45, 35, 14), 8)
WINDOW = {"window_level": 100, "window_width": 200}
LABELS = {"liver": 1, "spleen": 2, "aorta": 3}


class GreedyEngine(ThresholdEngine):
    """Claims all that is bright, the more surely the nearer to the prompt."""

    def _one(self, grey, prompt):
        self.decoded.append(prompt)
        y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
        points = prompt.positive if len(prompt.positive) else np.array([[prompt.box[0], prompt.box[1]]])
        distance = np.min([np.hypot(x - px, y - py) for px, py in points], axis=0)
        logits = np.where(grey > 0.5, 10 / (1 + distance), -5.0).astype(np.float32)[None]
        return Candidates(logits=logits, iou=np.array([0.9], np.float32))


@pytest.fixture
def engine():
    return ThresholdEngine()


@pytest.fixture
def files(tmp_path):
    hu = np.where(BALL | OTHER, 200, 0).astype(np.int16)
    hu[0, 0, 0] = -1000
    nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 2.5, 1])), tmp_path / "ct.nii.gz")
    return tmp_path


def task_of(engine):
    return MultiInfer(encoder=SliceEncoder(engine=engine), library=ImageLibrary(limit=1 << 30), labels=LABELS)


@pytest.fixture
def ask(engine, files):
    task = task_of(engine)

    def answer(**request):
        path, params = task(
            {"image": str(files / "ct.nii.gz"), "result_extension": ".nrrd", **WINDOW, **request}
        )
        return nrrd.read(path)[0], params

    return answer


def sent(files, labelmap):
    nib.save(nib.Nifti1Image(labelmap.astype(np.uint8), np.diag([1, 1, 2.5, 1])), files / "sent.nii.gz")
    return str(files / "sent.nii.gz")


def test_each_label_gets_its_object(ask):
    mask, params = ask(liver=[[20, 15, 14]], spleen=[], aorta=[[45, 35, 14]], background=[], label="aorta")
    assert ((mask == 1) ^ BALL).sum() < 0.02 * BALL.sum()
    assert ((mask == 3) ^ OTHER).sum() < 0.02 * OTHER.sum()
    assert params["label_names"] == {"liver": 1, "aorta": 3}
    assert set(params["objects"]) == {"liver", "aorta"}
    assert params["contested"] == []


def test_what_two_claim_goes_to_the_surer_one(files):
    hu = np.zeros((40, 20, 1), np.int16)
    hu[5:35, 5:15] = 200
    nib.save(nib.Nifti1Image(hu, np.eye(4)), files / "bar.nii")
    path, params = task_of(GreedyEngine())(
        {"image": str(files / "bar.nii"), "liver": [[10, 10, 0]], "spleen": [[30, 10, 0]], **WINDOW}
    )
    mask = np.asarray(nib.load(path).dataobj)[:, :, 0]
    assert (mask[5:20, 5:15] == 1).all()
    assert (mask[21:35, 5:15] == 2).all()
    assert params["contested"] == [0]


def test_a_clicked_voxel_belongs_to_what_it_was_clicked_for(ask):
    mask, _ = ask(liver=[[20, 15, 14], [2, 40, 3]], spleen=[[22, 15, 14]], background=[[18, 15, 14]])
    assert mask[2, 40, 3] == 1
    assert mask[20, 15, 14] == 1
    assert mask[22, 15, 14] == 2
    assert mask[18, 15, 14] == 0


def test_slice_answers_that_slice_alone(ask, files):
    points = {"liver": [[20, 15, 14], [20, 15, 12]], "aorta": [[45, 35, 20]], "slice": 14}
    mask, params = ask(**points)
    np.testing.assert_array_equal(mask[:, :, 14] == 1, BALL[:, :, 14])
    assert mask.astype(bool).sum() == BALL[:, :, 14].sum()
    assert params["label_names"] == {"liver": 1}
    existing = np.where(BALL, 1, 0) + 2 * OTHER
    mask, _ = ask(**points, label_file=sent(files, existing))
    np.testing.assert_array_equal(mask, existing)


def test_objects_that_nobody_clicked_keep_their_voxels(ask, files):
    existing = np.where(BALL & (np.arange(30) > 13), 2, 0)
    mask, params = ask(liver=[[20, 15, 10]], label_file=sent(files, existing))
    np.testing.assert_array_equal(mask == 2, existing == 2)
    assert (mask == 1).any()
    assert params["label_names"] == {"liver": 1, "spleen": 2}


def test_a_point_on_another_labels_object_takes_its_part_over(ask, files):
    """The file calls both balls liver; a click says that one is spleen."""
    mask, params = ask(spleen=[[45, 35, 14]], label_file=sent(files, np.where(BALL | OTHER, 1, 0)))
    np.testing.assert_array_equal(mask[:, :, 14] == 2, OTHER[:, :, 14])
    np.testing.assert_array_equal((mask == 1) & BALL, BALL)
    assert set(params["objects"]) == {"liver", "spleen"}


def test_the_nearest_point_of_another_label_is_a_background_point(ask, engine):
    ask(liver=[[20, 15, 14]], spleen=[[45, 35, 14], [55, 40, 14]], aorta=[[40, 30, 13]])
    seen = {tuple(p.positive[0]): p.negative.tolist() for p in engine.decoded if len(p.positive)}
    assert seen[20, 15] == [[45, 35]]
    assert seen[45, 35] == [[20, 15]]
    assert seen[40, 30] == []


def test_a_background_point_corrects_the_object_that_it_is_on(ask, files):
    existing = np.where(BALL | OTHER, 1, 0)
    mask, params = ask(background=[[45, 35, 14]], label_file=sent(files, existing))
    assert not (mask[:, :, 14].astype(bool) & OTHER[:, :, 14]).any()
    np.testing.assert_array_equal((mask == 1) & BALL, BALL)
    assert list(params["objects"]) == ["liver"]


def test_a_box_is_for_the_label_that_is_drawn(ask, engine):
    mask, _ = ask(label="spleen", roi=[35, 55, 25, 45, 14, 14], liver=[[20, 15, 14]])
    assert ((mask == 2) ^ OTHER).sum() < 0.02 * OTHER.sum()
    assert (mask == 1).any()
    mask, _ = ask(label="background", roi=[35, 55, 25, 45, 14, 14], liver=[[20, 15, 14]])
    assert not (mask == 2).any()


def test_a_new_click_recomputes_its_own_object_only(ask, engine):
    first, _ = ask(liver=[[20, 15, 14]], aorta=[[45, 35, 14]])
    before = len(engine.decoded)
    again, _ = ask(liver=[[20, 15, 14]], aorta=[[45, 35, 14]])
    assert len(engine.decoded) == before
    np.testing.assert_array_equal(first, again)
    ask(liver=[[20, 15, 14]], aorta=[[45, 35, 14]], spleen=[[20, 15, 20]])
    assert all(abs(p[0] - 20) < 15 for prompt in engine.decoded[before:] for p in prompt.positive)
    assert len(engine.decoded) > before


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "label = None: nothing says where an object is.*liver, spleen, aorta"),
        ({"background": [[1, 1, 1]]}, "nothing says where"),
        ({"kidney": [[1, 1, 1]]}, "nothing says where"),
        ({"liver": [[60, 1, 1]]}, r"liver = \[60"),
        ({"liver": "here"}, "liver = 'here'"),
        ({"liver": [[1, 1, 1]], "spleen": [[2, 2, 2], [1, 1, 1]]}, r"spleen = \[1, 1, 1\]: the same voxel"),
        ({"liver": [[1, 1, 1]], "background": [[1, 1, 1]]}, "the same voxel is a point of background"),
        ({"roi": [1, 5, 1, 5, 1, 1]}, "label = None: a roi needs the label"),
        ({"roi": [1, 5, 1, 5, 1, 1], "label": ["liver"]}, "label"),
        ({"liver": [[1, 1, 1]], "slice": 30}, "slice = 30"),
        ({"liver": [[1, 1, 1]], "slice": 2}, "nothing says where"),
    ],
)
def test_bad_requests_say_what_to_do(ask, request_, message):
    with pytest.raises(InputError, match=message):
        ask(**request_)


def test_values_of_a_sent_label_map_are_the_projects(ask, files):
    with pytest.raises(InputError, match=r"label = 7: not a value.*1 = liver, 2 = spleen"):
        ask(liver=[[20, 15, 14]], label_file=sent(files, 7 * BALL))


def test_a_label_of_a_request_keys_name_is_refused(engine):
    with pytest.raises(InputError, match="labels = 'roi'"):
        MultiInfer(encoder=SliceEncoder(engine=engine), library=ImageLibrary(limit=1), labels={"roi": 1})


point = st.sampled_from(
    [[0, 0, 0], [1, 1, 1], [3, 2, 1], [4, 0, 0], [1, 1], 5, None, [float("nan")] * 3, "ab"]
)
points = st.lists(point, max_size=4) | st.sampled_from([None, "", 0, {"a": 1}, [[]], [1, 1, 1]])
keys = ("liver", "spleen", "background", "roi", "slice", "label")


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(keys, points)))
def test_any_request_is_read_or_refused(request_):
    try:
        objects = parse_objects(request_, (4, 3, 2), labels=LABELS)
        assert all(
            (c.foreground >= 0).all() and (c.foreground < (4, 3, 2)).all() for c in objects.clicks.values()
        )
    except InputError as error:
        assert 400 <= error.status < 500


def slicer_import(labelmap, label_names, segments):
    """What 3D Slicer makes of a reply: value n is the n-th name; a named segment is cleared first."""
    names = [
        name for name, _ in sorted(label_names.items(), key=lambda item: item[1]) if name != "background"
    ]
    return {**segments, **{name: labelmap == n for n, name in enumerate(names, start=1)}}


def ohif_import(labelmap, clicked, labels):
    """What OHIF's panel makes of a file: a name's index by the model's labels, else its position."""
    names = {}
    for position, label in enumerate(clicked, start=1):
        names[labels.get(label) or position] = label
    return {name: labelmap == value for value, name in names.items()}


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_both_viewers_get_every_object_under_its_name(values):
    labelmap = np.array(values, np.uint8).reshape(2, 2, 2)
    before = {name: np.ones((2, 2, 2), bool) for name in LABELS}
    named, names = numbered(labelmap, LABELS, {"label_values": "contiguous"})
    seen = slicer_import(named, names, before)
    for name, value in LABELS.items():
        expected = labelmap == value if value in values else before[name]
        np.testing.assert_array_equal(seen[name], expected)
    alone, _ = numbered(labelmap, LABELS, {})
    labels = {**LABELS, "background": 255}
    for clicked in (["aorta", "liver", "background"], ["background", "spleen"], ["spleen", "background"]):
        seen = ohif_import(alone, clicked, labels)
        for name in set(clicked) - {"background"}:
            np.testing.assert_array_equal(seen[name], labelmap == LABELS[name])


def test_over_rest_each_viewer_gets_its_values(served, tmp_path):
    client, _, _ = served
    info = client.get("/info/").json()
    assert info["labels"] == ["liver", "spleen", "aorta", "background"]
    model = info["models"]["sam_multi"]
    assert (model["type"], model["dimension"]) == ("deepedit", 3)
    assert model["labels"] == {"liver": 1, "spleen": 2, "aorta": 3, "background": 255}
    points = {"liver": [[4, 5, 2]], "spleen": [], "aorta": [[9, 8, 3]], "background": []}
    reply = infer(client, "sam_multi", label="aorta", result_extension=".nrrd", **points, **WINDOW)
    found = parts(reply)
    assert json.loads(found["params"])["label_names"] == {"liver": 1, "aorta": 2}
    (tmp_path / "slicer.nrrd").write_bytes(found["image"])
    slicer = nrrd.read(str(tmp_path / "slicer.nrrd"))[0]
    reply = infer(client, "sam_multi", output="image", result_extension=".nrrd", **points, **WINDOW)
    (tmp_path / "ohif.nrrd").write_bytes(reply.content)
    ohif = nrrd.read(str(tmp_path / "ohif.nrrd"))[0]
    assert set(np.unique(slicer)) == {0, 1, 2}
    assert set(np.unique(ohif)) == {0, 1, 3}
    np.testing.assert_array_equal(slicer == 2, ohif == 3)
    assert infer(client, "sam_multi", liver=[[99, 0, 0]]).status_code == 400
    reply = infer(client, "sam_multi", liver=[[4, 5, 2]], save_label=True, **WINDOW)
    assert reply.status_code == 200, reply.text


def test_a_picture_takes_columns_and_rows(served):
    client, _, _ = served
    reply = infer(client, "sam_multi", image="photo", output="json", liver=[[22, 5]], spleen=[[2, 2]])
    assert reply.json()["label_names"] == {"liver": 1, "spleen": 2}
    assert reply.json()["objects"]["liver"]["slices"] == [0]
