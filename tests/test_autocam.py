import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from sam_infer.autocam import CamOptions, auto_cam
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.geometry import slice_image
from sam_infer.intensity import EIGHT_BIT
from sam_infer.library import ImageLibrary
from sam_infer.networks.classifier import build_classifier, save_classifier
from sam_infer.prompts.activation import activation_parts, box_iou
from sam_infer.tasks.autocam import AutoCamInfer
from sam_infer.volumes import read_image
from tests.cam_data import LABELS, as_image, scene, trained
from tests.fakes import ThresholdEngine
from tests.loop_data import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
#: Where both objects are there, only the disc, only the square, and neither.
KINDS = ((True, True), (True, False), (False, True), (False, False))


class Brighter(ThresholdEngine):
    """Both objects are brighter than 0.35; a box gives what is bright in it, the surer the brighter it is."""

    def _one(self, grey, prompt):
        found = super()._one(np.where(grey > 0.35, 1.0, 0.0), prompt)
        return replace(found, logits=np.where(found.logits > 0, 5.0 + grey, -5.0).astype(np.float32))


@pytest.fixture
def encoder():
    return SliceEncoder(engine=Brighter())


@pytest.fixture
def task(tmp_path, encoder):
    save_classifier(tmp_path / "cam.safetensors", trained())
    return infer(tmp_path, encoder)


def infer(folder, encoder, labels=LABELS):
    library = ImageLibrary(limit=1 << 24)
    return AutoCamInfer(
        path=folder / "cam.safetensors", encoder=encoder, library=library, labels=labels, device="cpu"
    )


def volume(seed=4000):
    scenes = [scene(seed + n, disc=disc, square=square) for n, (disc, square) in enumerate(KINDS)]
    return as_image(*[one[0] for one in scenes]), [one[1] for one in scenes]


def save(folder, seed, **kinds):
    pixels, labelmap = scene(seed, **kinds)
    PilImage.fromarray(pixels).save(folder / "case.png")
    return {"image": str(folder / "case.png"), "result_extension": ".nrrd"}, labelmap


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_volume_is_labelled_where_the_classifier_looks_and_nowhere_else(encoder):
    image, truth = volume()
    found = auto_cam(image, trained(), encoder=encoder, window=EIGHT_BIT, options=CamOptions())
    for name, column in (("disc", 0), ("square", 1)):
        assert sorted(found.labels[name].slices) == [k for k, kind in enumerate(KINDS) if kind[column]]
        for k, answer in found.labels[name].slices.items():
            wanted = truth[k] == LABELS[name]
            (box,) = answer.boxes
            rows, columns = np.nonzero(wanted)
            true = (columns.min(), rows.min(), columns.max(), rows.max())
            assert box_iou(box, true) > 0.1, (name, k)
            assert dice(slice_image(found.labelmap, k) == LABELS[name], wanted) > 0.5, (name, k)
    assert not found.labelmap[:, :, 3].any()
    assert found.labelmap.shape == image.shape and found.labelmap.dtype == np.uint8
    assert found.uncertainty is None


def test_boxes_are_those_of_the_activation_map_and_all_labels_go_in_one_call(encoder, monkeypatch):
    image, _ = volume()
    calls = []
    decode = encoder.decode
    monkeypatch.setattr(
        encoder, "decode", lambda *args, **kw: calls.append((args[1], args[3])) or decode(*args, **kw)
    )
    options = CamOptions(threshold=0.6, every=True, presence=0.0)
    found = auto_cam(image, trained(), encoder=encoder, window=EIGHT_BIT, options=options)
    assert [k for k, _ in calls] == [0, 1, 2, 3]
    sent = 0
    for k, prompts in calls:
        boxes = []
        for name in LABELS:
            activation = trained().activation(image, EIGHT_BIT, k, name)
            if activation is None:
                assert k in found.labels[name].silent
                continue
            for part in activation_parts(activation, threshold=0.6, every=True):
                rows, columns = np.nonzero(part)
                boxes.append((columns.min(), rows.min(), columns.max(), rows.max()))
        assert [prompt.box for prompt in prompts] == boxes
        sent += len(boxes)
    assert sum(len(one.boxes) for label in found.labels.values() for one in label.slices.values()) == sent


def test_a_pixel_that_two_labels_want_goes_to_the_highest_logit(encoder):
    class Both(Brighter):
        """Answers every box with the same two halves, the later box the surer."""

        def decode(self, embedding, prompts):
            out = []
            for n, prompt in enumerate(prompts):
                found = self._one(np.ones(embedding.image_size, np.float32), prompt)
                logits = np.full_like(found.logits, -1.0)
                logits[:, :, : 40 - 20 * n] = 1.0 + n
                out.append(replace(found, logits=logits))
            return out

    image, _ = volume()
    found = auto_cam(
        image,
        trained(),
        encoder=SliceEncoder(engine=Both()),
        window=EIGHT_BIT,
        options=CamOptions(),
        zoom=False,
        uncertainty=True,
    )
    first = slice_image(found.labelmap, 0)
    assert (first[:, :20] == LABELS["square"]).all() and (first[:, 20:40] == LABELS["disc"]).all()
    assert not first[:, 40:].any()
    entropy = slice_image(found.uncertainty, 0) / 255
    # the most doubtful mask at each place: 1 of (1, 2), 1 of (1, -1), and -1 of both are equally unsure
    p = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(entropy, -p * np.log2(p) - (1 - p) * np.log2(1 - p), atol=0.003)
    assert not found.uncertainty[:, :, 3].any()


def test_reply_tells_presence_prompts_and_what_is_absent(task, tmp_path):
    request, truth = save(tmp_path, 4002, disc=False)
    file, reply = task(request)
    found = slice_image(read_image(file).array, 0)
    assert reply["label_names"] == {"square": 7} and set(np.unique(found)) == {0, 7}
    assert dice(found == 7, truth == 7) > 0.5
    assert reply["presence"]["square"] >= 0.5 > reply["presence"]["disc"]
    assert list(reply["objects"]) == ["square"] and reply["objects"]["square"]["slices"] == [0]
    prompt = reply["objects"]["square"]["prompts"]["0"]
    assert prompt["presence"] == reply["presence"]["square"] and len(prompt["boxes"]) == 1
    assert 0 < prompt["agreement"] <= 1 and prompt["score"] == reply["score"] == pytest.approx(0.9)
    assert reply["missing"]["disc"].startswith("absent: its probability")
    assert reply["window"] == {"level": 127.5, "width": 255.0} and json.dumps(reply)


def test_options_change_what_is_looked_for(task, tmp_path):
    request, _ = save(tmp_path, 4000)
    assert set(task(request)[1]["objects"]) == {"disc", "square"}
    assert set(task({**request, "labels": ["disc"]})[1]["presence"]) == {"disc"}
    none = task({**request, "presence_threshold": 1.0})[1]
    assert none["objects"] == {} and none["empty"] and none["score"] is None
    assert set(none["missing"]) == {"disc", "square"}

    def area(**options):
        x0, y0, x1, y1 = task({**request, **options})[1]["objects"]["disc"]["prompts"]["0"]["boxes"][0]
        return (x1 - x0) * (y1 - y0)

    assert area(cam_threshold=0.2) > area() > area(cam_threshold="0.8")
    file, reply = task.answer({**request, "output_uncertainty": True})
    assert file.uncertainty is not None and set(reply["uncertainty"]) == {"disc", "square"}


@pytest.mark.parametrize(
    "name, value",
    [
        ("presence_threshold", 1.5),
        ("presence_threshold", "often"),
        ("presence_threshold", float("nan")),
        ("cam_threshold", 0),
        ("cam_threshold", -0.1),
        ("cam_threshold", True),
        ("cam_every_part", "perhaps"),
        ("labels", ["liver"]),
        ("zoom", "twice"),
        ("output_uncertainty", 3),
    ],
)
def test_wrong_options_are_named(task, tmp_path, name, value):
    request, _ = save(tmp_path, 4000)
    with pytest.raises(InputError, match=name) as error:
        task({**request, name: value})
    assert error.value.status == 400


def test_a_map_that_shows_nothing_prompts_nothing(tmp_path, encoder):
    model = trained()
    blind = build_classifier(labels=2, channels=model.channels)
    blind.load_state_dict(model.network.state_dict())
    with torch.no_grad():
        blind.fc.weight.fill_(-0.01)  # no evidence speaks for a label, and yet each is present
        blind.fc.bias.fill_(9.0)
    save_classifier(tmp_path / "cam.safetensors", replace(model, network=blind.eval()))
    request, _ = save(tmp_path, 4000)
    reply = infer(tmp_path, encoder)(request)[1]
    assert reply["empty"] and reply["objects"] == {} and encoder.engine.decoded == []
    assert "activation map shows nothing" in reply["missing"]["disc"]


def test_untrained_task_is_listed_without_labels_and_answers_409(tmp_path, encoder):
    task = infer(tmp_path, encoder)
    assert task.is_valid() and task.info()["labels"] == []
    with pytest.raises(InputError, match=r"not trained yet.*POST /train/cam_classifier") as error:
        task({"image": "x.png"})
    assert error.value.status == 409
    save_classifier(tmp_path / "cam.safetensors", trained())
    assert task.info()["labels"] == LABELS and task.fingerprint()
    other = infer(tmp_path, encoder, {"liver": 1})
    with pytest.raises(InputError, match=r"the project has.*liver"):
        other({"image": "x.png"})
