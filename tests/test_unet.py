import json
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sam_infer.errors import InputError
from sam_infer.intensity import EIGHT_BIT
from sam_infer.networks.unet import (
    UnetModel,
    build_unet,
    check_size,
    fitted,
    from_square,
    load_unet,
    save_unet,
    to_square,
)
from sam_infer.tasks.unet import UnetInfer
from sam_infer.volumes import Image, read_image
from tests.loop_data import (
    one_thread,  # noqa: F401
    window_for,
)

LABELS = {"liver": 3, "lesion": 7}

pytestmark = pytest.mark.usefixtures("one_thread")


class Threshold(torch.nn.Module):
    """Grey above ``high`` is the second label, above ``low`` the first: what a trained network would do."""

    def __init__(self, low=0.4, high=0.8):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(50.0))
        self.low, self.high = low, high

    def forward(self, x):
        between = torch.minimum(x - self.low, self.high - x)
        return self.scale * torch.cat([self.low - x, between, x - self.high], dim=1)


def model(network=None, **kwargs):
    torch.manual_seed(0)
    network = network or build_unet(labels=2)
    return UnetModel(network=network.eval(), labels=LABELS, size=32, **kwargs)


def image(array, key=("k",)):
    return Image(array=array, affine=np.diag([1.0, 2.0, 3.0, 1.0]), key=key, flat=False)


def infer(path, labels=LABELS):
    return UnetInfer(path=path, labels=labels, window_for=window_for, read=read_image)


def test_file_round_trip_keeps_weights_and_header(tmp_path):
    before = model(window={"ct": [40, 400]}, training={"round": 3})
    digest = save_unet(tmp_path / "m.safetensors", before)
    after = load_unet(tmp_path / "m.safetensors")
    weights, kept = before.network.state_dict(), after.network.state_dict()
    assert list(weights) == list(kept) and all(torch.equal(weights[name], kept[name]) for name in weights)
    assert list(after.labels.items()) == list(LABELS.items())
    assert (after.size, dict(after.window), after.training["round"]) == (32, {"ct": [40, 400]}, 3)
    assert after.fingerprint == digest[:16]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "noise", "other"])
def test_damaged_or_other_files_are_named(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    save_unet(path, model())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "noise":
        path.write_bytes(b"not weights at all")
    else:
        save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"m\.safetensors.*not a usable U-Net file"):
        load_unet(path)


def test_square_holds_a_non_square_slice_and_gives_it_back():
    ramp = torch.linspace(0, 1, 60)[None, None, None].expand(1, 1, 24, 60).contiguous()
    square = to_square(ramp, 32)
    assert fitted(24, 60, 32) == (13, 32)
    assert square.shape == (1, 1, 32, 32) and square[..., 13:, :].abs().max() == 0
    assert torch.allclose(from_square(square, 24, 60), ramp, atol=0.02)
    labels = to_square((ramp > 0.5).to(torch.uint8) * 7, 32)
    assert set(labels.unique().tolist()) == {0, 7}


def test_size_must_fit_the_network():
    assert check_size(64) == 64
    with pytest.raises(ValueError, match="multiple of 16"):
        check_size(100)


def test_labelmap_lies_where_the_object_is_and_has_the_labels_values():
    array = np.zeros((60, 24, 11), np.uint8)
    array[40:56, 4:16, 2] = 150
    array[4:20, 8:20, 9] = 255
    found = model(Threshold(0.3, 0.65)).predict_volume(image(array), EIGHT_BIT).labelmap
    truth = np.zeros_like(array)
    truth[array == 150], truth[array == 255] = 3, 7
    assert found.shape == truth.shape and found.dtype == np.uint8
    assert set(np.unique(found[:, :, [0, 1, 3, 10]])) == {0}
    for k, value in ((2, 3), (9, 7)):
        got, wanted = found[:, :, k] == value, truth[:, :, k] == value
        assert 2 * (got & wanted).sum() / (got.sum() + wanted.sum()) > 0.85


def test_confidence_is_lower_where_grey_lies_between_the_labels():
    network, confidences = Threshold(), []
    for grey in (150, 105):
        array = np.zeros((32, 32, 3), np.uint8)
        array[8:24, 8:24] = grey
        whole = model(network).predict_volume(image(array), EIGHT_BIT).confidence
        assert whole == pytest.approx(model(network).confidence(image(array), EIGHT_BIT), abs=1e-6)
        confidences.append(whole)
    assert confidences[0] > confidences[1] + 0.2
    assert model(network).confidence(image(np.zeros((32, 32, 1), np.uint8)), EIGHT_BIT) == 1.0


def test_untrained_task_is_listed_without_labels_and_answers_409(tmp_path):
    task = infer(tmp_path / "m.safetensors")
    assert task.is_valid() and task.info()["labels"] == [] and "not trained yet" in task.info()["description"]
    assert task.get_path() is None and task.get_path(validate=False)
    with pytest.raises(InputError, match="not trained yet: accept at least 4 cases") as error:
        task({"image": "x.png"})
    assert error.value.status == 409


def test_weights_of_other_labels_and_damaged_weights_answer_409(tmp_path):
    path = tmp_path / "m.safetensors"
    save_unet(path, model())
    task = infer(path, {"spleen": 1})
    assert task.info()["labels"] == []
    with pytest.raises(InputError, match=r"the project has.*spleen") as error:
        task({"image": "x.png"})
    assert error.value.status == 409
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be used") as error:
        task({"image": "x.png"})
    assert error.value.status == 409


def test_reply_names_exactly_the_classes_present_and_new_weights_are_picked_up(tmp_path, monkeypatch):
    from PIL import Image as PilImage

    pixels = np.zeros((24, 40), np.uint8)
    pixels[4:20, 24:36] = 255
    PilImage.fromarray(pixels).save(tmp_path / "case.png")
    path = tmp_path / "m.safetensors"
    save_unet(path, model(training={"round": 1}))
    task = infer(path)
    assert task.info()["labels"] == LABELS and "round 1" in task.info()["description"]
    monkeypatch.setattr("sam_infer.networks.unet.build_unet", lambda **kwargs: Threshold(0.5, 0.5))
    save_unet(path, model(Threshold(0.5, 0.5), training={"round": 2}))
    file, reply = task({"image": str(tmp_path / "case.png"), "result_extension": ".nrrd"})
    found = read_image(file).array[:, :, 0]
    assert found.shape == (40, 24) and set(np.unique(found)) == {0, 7}
    assert found[25:35, 6:18].all() and not found[:22].any()
    assert reply["label_names"] == {"lesion": 7} and reply["model"]["round"] == 2
    assert 0.5 < reply["score"] <= 1 and reply["window"] == {"level": 127.5, "width": 255.0}
    assert {"load", "predict", "write", "total"} <= set(reply["latencies"])
    assert json.dumps(reply) and not set(task.config()) & {"foreground", "label", "roi", "slice"}


def test_a_reader_never_meets_half_a_file_while_another_thread_publishes(tmp_path):
    path = tmp_path / "m.safetensors"
    save_unet(path, model())
    task, failures, done = infer(path), [], threading.Event()

    def read():
        while not done.is_set():
            if task.model() is None:
                failures.append(task.info()["description"])

    reader = threading.Thread(target=read)
    reader.start()
    for round_ in range(5):
        save_unet(path, model(training={"round": round_}))
    done.set()
    reader.join()
    assert not failures and task.model().training["round"] == 4
