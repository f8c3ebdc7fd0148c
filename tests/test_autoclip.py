"""Descriptions as prompts: with maps drawn by hand, and with a tiny CLIP that learned three shapes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PilImage

from sam_infer import autoclip
from sam_infer.autoclip import ClipOptions, auto_clip
from sam_infer.clip.contrast import NONSENSE, Contrast
from sam_infer.clip.model import ClipModel
from sam_infer.clip.regions import REGIONS
from sam_infer.clip.saliency import SALIENCIES, gradcam
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError
from sam_infer.geometry import slice_image
from sam_infer.intensity import EIGHT_BIT
from sam_infer.library import ImageLibrary
from sam_infer.tasks.autoclip import AutoClipInfer
from sam_infer.volumes import Image, read_image
from tests import tiny_clip
from tests.fakes import ThresholdEngine

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = {"ball": 3, "box": 7, "rod": 2}
TEXTS = {"ball": "left", "box": "right"}


def painted(model, pixels, text):
    """Looks left for "left", right for "right", nowhere for "nowhere", and at a corner for any other text."""
    bright = pixels > 0.5
    half = pixels.shape[1] // 2
    looked = np.zeros(pixels.shape, np.float32)
    if text == "left":
        looked[:, :half] = bright[:, :half]
    elif text == "right":
        looked[:, half:] = bright[:, half:]
    elif text == "nowhere":
        return None
    else:
        looked[:4, :4] = 1
    return looked if looked.any() else None


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def slices():
    """Two bright shapes, the left one in two parts; the left one alone; nothing at all."""
    both = np.zeros((40, 60), np.uint8)
    both[5:15, 5:20], both[25:30, 8:14], both[20:32, 40:52] = 200, 200, 220
    left = both.copy()
    left[:, 30:] = 0
    return both, left, np.full((40, 60), 9, np.uint8)


@pytest.fixture
def by_hand(monkeypatch):
    monkeypatch.setitem(SALIENCIES, "gradcam", painted)
    monkeypatch.setitem(REGIONS, "crf", lambda saliency, _: saliency > 0.5)


@pytest.fixture
def encoder():
    return SliceEncoder(engine=ThresholdEngine())


def volume(*images):
    stacked = np.stack(images, axis=-1).swapaxes(0, 1)
    return Image(array=stacked, affine=np.eye(4), key=("k",), flat=False)


def run(encoder, texts=TEXTS, **options):
    image = volume(*slices())
    return auto_clip(
        image, None, texts, values=LABELS, encoder=encoder, window=EIGHT_BIT, options=ClipOptions(**options)
    )


def test_each_label_is_prompted_with_the_box_and_the_points_of_its_largest_part(by_hand, encoder):
    found = run(encoder)
    assert {name: sorted(one.slices) for name, one in found.labels.items()} == {"ball": [0, 1], "box": [0]}
    assert found.labels["box"].silent == [1, 2] and found.labels["ball"].silent == [2]
    assert found.labels["ball"].slices[0].boxes == [(5, 5, 19, 14)]
    for prompt in encoder.engine.decoded:
        assert prompt.points.shape == (8, 2) and prompt.point_labels.all()
        low, high = np.array(prompt.box[:2]), np.array(prompt.box[2:])
        assert ((prompt.points >= low) & (prompt.points <= high)).all()
    wanted = np.zeros((40, 60), np.uint8)
    wanted[5:15, 5:20], wanted[20:32, 40:52] = 3, 7
    np.testing.assert_array_equal(slice_image(found.labelmap, 0), wanted)
    assert not found.labelmap[..., 2].any()
    assert found.labels["ball"].slices[0].agreement == 1 and found.labels["ball"].score == pytest.approx(0.9)
    before = [one.points for one in encoder.engine.decoded]
    run(encoder)
    for one, again in zip(before, encoder.engine.decoded[len(before) :], strict=True):
        np.testing.assert_array_equal(one, again.points)


def test_options_choose_parts_points_and_slices(by_hand, encoder):
    found = run(encoder, keep="large", points=0, slices=[1])
    assert found.labels["ball"].slices[1].boxes == [(5, 5, 19, 14), (8, 25, 13, 29)]
    assert list(found.labels["ball"].slices) == [1] and not any(len(p.points) for p in encoder.engine.decoded)
    assert len(run(encoder, keep=1).labels["ball"].slices[0].boxes) == 1


def test_a_map_that_nonsense_gives_too_is_rejected_and_the_engine_not_asked(by_hand, encoder, monkeypatch):
    def blind(model, pixels, text):
        return painted(model, pixels, "left")

    monkeypatch.setitem(SALIENCIES, "gradcam", blind)
    found = run(encoder)
    assert not found.labelmap.any() and encoder.engine.decoded == []
    for one in found.labels.values():
        assert one.rejected == [0, 1] and one.contrast[0].iou == 1
        assert one.contrast[0].correlation == pytest.approx(1)
    assert run(encoder, contrast=None).labelmap.any()
    monkeypatch.setitem(SALIENCIES, "gradcam", painted)
    assert run(encoder).labels["ball"].contrast[0].depends


def test_nonsense_is_looked_at_once_a_slice(by_hand, encoder, monkeypatch):
    seen = []

    def counted(model, pixels, text):
        seen.append(text)
        return painted(model, pixels, text)

    monkeypatch.setitem(autoclip.SALIENCIES, "gradcam", counted)
    run(encoder, slices=[0])
    assert sorted(seen) == sorted([*NONSENSE, "left", "right"])


class Here:
    def __init__(self, model, reason=""):
        self.model, self.reason = model, reason

    def current(self):
        return self.model, self.reason


class Named:
    fingerprint = "clip-1"


def make(encoder, model, texts=TEXTS, reason="", labels=LABELS):
    return AutoClipInfer(
        clip=Here(model, reason),
        encoder=encoder,
        library=ImageLibrary(limit=1 << 24),
        labels=labels,
        texts=texts,
    )


def case(folder, image):
    PilImage.fromarray(image).save(folder / "case.png")
    return {"image": str(folder / "case.png"), "result_extension": ".nrrd"}


def test_reply_tells_prompts_what_was_rejected_and_why_a_label_is_missing(by_hand, encoder, tmp_path):
    task = make(encoder, Named(), {**TEXTS, "rod": "anything"})
    request = case(tmp_path, slices()[0])
    file, reply = task({**request, "contrast_iou": 1})
    assert reply["label_names"] == {"ball": 3, "box": 7}
    assert set(np.unique(read_image(file).array)) == {0, 3, 7}
    assert list(reply["objects"]) == ["ball", "box"] and list(reply["rejected"]) == ["rod"]
    assert reply["rejected"]["rod"]["0"] == {"correlation": 1.0, "iou": 1.0}
    assert "looks there for nonsense too" in reply["missing"]["rod"]
    prompt = reply["objects"]["ball"]["prompts"]["0"]
    assert prompt["boxes"] == [[5, 5, 19, 14]] and prompt["score"] == reply["score"] == pytest.approx(0.9)
    assert prompt["correlation"] < 0.2 and reply["texts"]["rod"] == "anything" and json.dumps(reply)
    assert set(task({**request, "contrast": False})[1]["objects"]) == {"ball", "box", "rod"}
    assert set(task({**request, "labels": ["box"]})[1]["objects"]) == {"box"}
    file, reply = task.answer({**request, "output_uncertainty": "true", "label": "box"})
    assert file.uncertainty is not None and set(reply["uncertainty"]) == {"box"}
    undescribed = make(encoder, Named(), {"ball": "nowhere"})(request)[1]
    assert undescribed["empty"] and "no description" in undescribed["missing"]["rod"]
    assert "shows nothing" in undescribed["missing"]["ball"] and undescribed["score"] is None
    assert make(encoder, Named()).info()["labels"] == LABELS
    mark = make(encoder, Named()).fingerprint()
    assert "clip-1" in mark and "threshold-1" in mark
    assert mark != make(encoder, Named(), {"ball": "nowhere"}).fingerprint(), "a batch starts anew"


def test_without_a_model_it_is_listed_without_labels_and_answers_409(encoder):
    task = make(encoder, None, reason="fetch it with `samloop weights fetch biomed_clip`")
    assert task.is_valid() and task.info()["labels"] == []
    with pytest.raises(InputError, match="samloop weights fetch biomed_clip") as told:
        task({"image": "x.png"})
    assert told.value.status == 409


@pytest.mark.parametrize(
    "name, value",
    [
        ("saliency", "attention"),
        ("region", 3),
        ("parts", 0),
        ("parts", "some"),
        ("points", -1),
        ("points", 2.5),
        ("contrast", "perhaps"),
        ("contrast_correlation", 2),
        ("labels", ["liver"]),
        ("slice", 1),
        ("zoom", "twice"),
    ],
)
def test_wrong_options_are_named(by_hand, encoder, tmp_path, name, value):
    with pytest.raises(InputError, match=name) as told:
        make(encoder, Named())({**case(tmp_path, slices()[0]), name: value})
    assert told.value.status == 400


def test_options_may_come_back_as_they_were_listed(by_hand, encoder, tmp_path):
    task = make(encoder, Named())
    reply = task({**case(tmp_path, slices()[0]), **task.info()["config"]})[1]
    assert set(reply["objects"]) == {"ball", "box"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return ClipModel(tiny_clip.trained_folder(tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(99)
    return [tiny_clip.scene(rng) for _ in range(8)]


@pytest.mark.slow
def test_a_model_looks_at_the_shape_that_the_text_names(trained, scenes):
    inside, shifts = [], []
    for image, masks in scenes:
        first, second = masks
        maps = {name: gradcam(trained, image, f"a {name}") for name in masks}
        inside += [
            maps[a][masks[a]].mean() > maps[a][masks[b]].mean() for a, b in ((first, second), (second, first))
        ]
        shifts.append(np.corrcoef(maps[first].ravel(), maps[second].ravel())[0, 1])
    assert np.mean(inside) >= 0.9 and np.median(shifts) < 0.8


@pytest.mark.slow
def test_gscorecam_looks_there_too(trained, scenes):
    inside = []
    for image, masks in scenes:
        for name, other in zip(masks, list(masks)[::-1], strict=True):
            found = SALIENCIES["gscorecam"](trained, image, f"a {name}")
            inside.append(found[masks[name]].mean() > found[masks[other]].mean())
    assert np.mean(inside) >= 0.75


@pytest.mark.slow
def test_most_maps_of_a_model_that_reads_are_believed_and_none_of_one_that_does_not(
    trained, scenes, tmp_path, encoder
):
    import torch

    folder = tmp_path / "blind"
    folder.mkdir()
    for file in trained.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    state["ln_final.weight"] *= 1e-6  # every text is now nearly the same one
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    image = volume(*[np.rint(one * 255).astype(np.uint8) for one, _ in scenes])
    texts = {name: f"a {name}" for name in tiny_clip.SHAPES}
    values = dict(zip(texts, (1, 2, 3), strict=True))
    believed = {}
    for name, model in (("reads", trained), ("blind", ClipModel(folder))):
        found = auto_clip(
            image, model, texts, values=values, encoder=encoder, window=EIGHT_BIT, options=ClipOptions()
        )
        judged = [verdict.depends for one in found.labels.values() for verdict in one.contrast.values()]
        assert len(judged) > 12
        believed[name] = np.mean(judged)
    assert believed["reads"] > 0.7 and believed["blind"] == 0


@pytest.mark.slow
def test_descriptions_segment_shapes_with_sam_tiny(trained, tmp_path):
    encoder = SliceEncoder(engine=create_engine("sam_tiny"))
    labels = {name: n for n, name in enumerate(tiny_clip.SHAPES, start=1)}
    task = make(encoder, trained, {name: f"a {name}" for name in labels}, labels=labels)
    rng = np.random.default_rng(7)
    found = []
    for _ in range(6):
        image, masks = tiny_clip.scene(rng)
        request = case(tmp_path, np.rint(image * 255).astype(np.uint8))
        file, reply = task({**request, "labels": list(masks), "contrast": False})
        answer = slice_image(read_image(file).array, 0)
        found += [dice(answer == labels[name], mask) for name, mask in masks.items()]
        assert set(reply["objects"]) == set(masks)
    assert np.median(found) > 0.7


@pytest.mark.slow
def test_limits_decide_what_is_believed(trained, scenes, encoder):
    image = volume(np.rint(scenes[0][0] * 255).astype(np.uint8))
    name = next(iter(scenes[0][1]))

    def rejected(**limits):
        options = ClipOptions(contrast=replace(Contrast(), **limits))
        texts = {name: f"a {name}"}
        found = auto_clip(
            image, trained, texts, values={name: 1}, encoder=encoder, window=EIGHT_BIT, options=options
        )
        return found.labels[name].rejected

    assert rejected(correlation=-1.0) == [0] and rejected(correlation=1.1, iou=1.1) == []
