"""`sam_auto_net` and uncertainty maps, with a U-Net that is trained here on discs of two greys."""

import json

import numpy as np
import pytest
import torch

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.intensity import EIGHT_BIT
from sam_infer.library import ImageLibrary
from sam_infer.networks.unet import UnetModel, build_unet, save_unet, to_square
from sam_infer.overlap import dice
from sam_infer.prompts.masks import cleaned_labelmap
from sam_infer.prompts.request import parse_names
from sam_infer.tasks.autonet import AutoNetInfer, parse_limits, parse_scheme
from sam_infer.tasks.unet import UnetInfer
from sam_infer.volumes import labelmap_bytes, read_image
from tests.conftest import disc, save_png
from tests.fakes import ThresholdEngine
from tests.loop_data import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = {"liver": 3, "lesion": 7, "spleen": 9}
SIZE = (40, 56)
GREYS = {3: 150, 7: 235}
CHANNELS = (16, 32)


def slice_of(objects, rng=None):
    """(H, W) uint8 image and label map with discs ((x, y), radius, value)."""
    image, labels = np.full(SIZE, 40, float), np.zeros(SIZE, np.uint8)
    for centre, radius, value in objects:
        mask = disc(SIZE, centre, radius)
        image[mask], labels[mask] = GREYS[value], value
    if rng is not None:
        image += rng.normal(0, 8, SIZE)
    return np.clip(image, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained():
    """A U-Net that has seen sixteen slices of two discs; one label of the project never occurs."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(16):
        x = rng.uniform(8, 18), rng.uniform(34, 48)
        places = [(float(one), float(rng.uniform(10, 30))) for one in x]
        values = rng.permutation([3, 7]).tolist()
        image, label = slice_of(zip(places, rng.uniform(4, 9, 2), values, strict=True), rng)
        images.append(image / 255)
        labels.append(label)
    inputs = to_square(torch.tensor(np.array(images), dtype=torch.float32)[:, None], 32)
    classes = np.searchsorted([0, *LABELS.values()], np.array(labels)).astype(np.uint8)
    targets = to_square(torch.tensor(classes)[:, None], 32)[:, 0].long()
    network = build_unet(labels=3, channels=CHANNELS).train()
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(120):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), targets).backward()
        optimiser.step()
    return UnetModel(
        network=network.eval(),
        labels=LABELS,
        size=32,
        channels=CHANNELS,
        training={"round": 2, "training_cases": 16},
    )


@pytest.fixture
def task(trained, tmp_path):
    """The task, over a folder in which the model is published."""
    save_unet(tmp_path / "unet.safetensors", trained)
    return make_task(tmp_path)


def make_task(folder, labels=LABELS):
    library = ImageLibrary(limit=1 << 28)
    unet = UnetInfer(
        path=folder / "unet.safetensors",
        labels=labels,
        window_for=library.window_for,
        read=library.read,
    )
    encoder = SliceEncoder(engine=ThresholdEngine())
    return AutoNetInfer(unet=unet, encoder=encoder, library=library, labels=labels)


TWO = [((14.0, 20.0), 8, 3), ((42.0, 18.0), 6, 7)]


@pytest.fixture
def picture(tmp_path):
    image, labels = slice_of(TWO)
    return save_png(tmp_path / "case.png", image), labels


@pytest.fixture
def volume(tmp_path):
    """A file of six slices, of which 1 to 4 hold something, and its (I, J, K) truth."""
    pairs = [slice_of(TWO if 1 <= k <= 3 else TWO[:1] if k == 4 else []) for k in range(6)]
    array, truth = (np.stack([pair[n] for pair in pairs]).transpose(2, 1, 0) for n in (0, 1))
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(labelmap_bytes(array, np.diag([1.0, 1.0, 3.0, 1.0]), ".nii.gz"))
    return path, truth


def ask(task, path, **request):
    file, reply = task.answer({"image": str(path), "result_extension": ".nrrd", **request})
    assert json.dumps(reply)
    return file, reply


def array_of(file, folder):
    (folder / f"answer{file.kind}").write_bytes(b"".join(file.parts))
    return read_image(folder / f"answer{file.kind}").array


def test_the_prediction_of_a_picture_prompts_sam(task, picture, tmp_path):
    path, truth = picture
    file, reply = ask(task, path)
    found = array_of(file, tmp_path)[:, :, 0].T
    assert np.array_equal(found, truth), "SAM, here a threshold, takes all of each object"
    assert reply["label_names"] == {"liver": 3, "lesion": 7} and reply["score"] == pytest.approx(0.9)
    assert reply["model"]["round"] == 2 and reply["engine"] == "threshold"
    assert reply["window"] == {"level": 127.5, "width": 255.0}
    liver = reply["objects"]["liver"]
    assert 0.7 < liver["agreement"] <= 1 and liver["score"] == pytest.approx(0.9) and liver["slices"] == 1
    prompt, other = (reply["objects"][name]["prompts"]["0"][0] for name in ("liver", "lesion"))
    np.testing.assert_allclose(prompt["box"], [6, 12, 22, 28], atol=2)
    np.testing.assert_allclose(prompt["positive"], [14, 20], atol=1)
    assert prompt["negatives"] == [other["positive"]]
    assert liver["region"]["low"][:2] == prompt["box"][:2] and liver["seed"][:2] == prompt["positive"]
    asked = task._encoder.engine.decoded
    assert len(asked) == 4 and asked[0].box == tuple(prompt["box"]) and asked[2].mask_logits is not None


def test_the_agreement_is_that_of_the_networks_cleaned_mask(task, picture, trained):
    path, truth = picture
    predicted = trained.predict_volume(read_image(path), EIGHT_BIT, certainty=True)
    predicted = cleaned_labelmap(predicted.labelmap, predicted.certainty)[:, :, 0].T
    _, reply = ask(task, path)
    for name, value in (("liver", 3), ("lesion", 7)):
        wanted = dice(predicted == value, truth == value)
        assert reply["objects"][name]["agreement"] == pytest.approx(wanted, abs=1e-3)


def test_a_label_that_the_network_does_not_show_is_told_in_words_and_never_prompted(task, picture, tmp_path):
    path, _ = picture
    file, reply = ask(task, path, labels=["spleen"])
    assert reply["objects"] == {} and reply["score"] is None and reply["label_names"] == {}
    assert "shows nothing of spleen" in reply["missing"]["spleen"]
    assert not array_of(file, tmp_path).any() and task._encoder.engine.decoded == []
    blank = save_png(tmp_path / "blank.png", slice_of([])[0])
    _, nothing = ask(task, blank)
    assert set(nothing["missing"]) == set(LABELS) and task._encoder.engine.decoded == []


def test_a_volume_is_cleaned_in_three_dimensions_and_refined_slice_by_slice(task, volume, tmp_path):
    path, truth = volume
    file, reply = ask(task, path)
    np.testing.assert_array_equal(array_of(file, tmp_path), truth)
    objects = reply["objects"]
    assert sorted(objects["liver"]["prompts"]) == ["1", "2", "3", "4"] and objects["lesion"]["slices"] == 3
    assert objects["liver"]["prompts"]["2"][0]["negatives"] == [
        objects["lesion"]["prompts"]["2"][0]["positive"]
    ]
    assert objects["liver"]["prompts"]["4"][0]["negatives"] == []
    region = objects["lesion"]["region"]
    assert (region["low"][2], region["high"][2]) == (1, 3) and set(reply["missing"]) == {"spleen"}


def test_one_label_alone_has_the_mask_that_it_has_among_all(task, volume, tmp_path):
    path, truth = volume
    file, reply = ask(task, path, label="lesion", label_values="contiguous")
    np.testing.assert_array_equal(array_of(file, tmp_path) == 1, truth == 7)
    assert reply["label_names"] == {"lesion": 1} and set(reply["objects"]) == {"lesion"}
    assert not reply["missing"] and reply["objects"]["lesion"]["prompts"]["1"][0]["negatives"]
    assert task._encoder.engine.encoded == 3


def test_answers_below_the_limits_leave_their_label_empty(task, picture, tmp_path):
    path, _ = picture
    _, reply = ask(task, path)
    agreements = {name: reply["objects"][name]["agreement"] for name in ("liver", "lesion")}
    worse, better = sorted(agreements, key=agreements.get)
    between = (agreements[worse] + agreements[better]) / 2
    file, reply = ask(task, path, min_agreement=between)
    assert set(reply["label_names"]) == {better} and reply["objects"][worse]["dropped"] == [0]
    assert set(np.unique(array_of(file, tmp_path))) == {0, LABELS[better]}
    _, reply = ask(task, path, min_iou=0.95)
    assert reply["label_names"] == {} and reply["empty"]


def test_the_uncertainty_map_lies_on_the_label_map(task, volume, tmp_path):
    path, truth = volume
    file, reply = ask(task, path, output_uncertainty=True)
    doubt = array_of(file.uncertainty, tmp_path)
    p = 1 / (1 + np.exp(-5.0))
    bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert doubt.shape == truth.shape and doubt.dtype == np.uint8
    assert set(np.unique(doubt[:, :, 1:5])) == {round(255 * bits)} and not doubt[:, :, [0, 5]].any()
    assert reply["uncertainty"] == {
        "liver": pytest.approx(bits, abs=0.003),
        "lesion": pytest.approx(bits, abs=0.003),
    }
    part, reply = ask(task, path, output_uncertainty=True, result_region=True)
    assert array_of(part.uncertainty, tmp_path).shape == array_of(part, tmp_path).shape != truth.shape
    assert ask(task, path)[0].uncertainty is None and "uncertainty" not in ask(task, path)[1]


def test_the_networks_own_uncertainty_is_highest_at_the_objects_edges(task, picture, tmp_path):
    path, truth = picture
    file, reply = ask(task._unet, path, output_uncertainty="true")
    doubt = array_of(file.uncertainty, tmp_path)[:, :, 0].T
    assert doubt.shape == SIZE
    edge = (truth > 0) & ~disc(SIZE, (14, 20), 7) & ~disc(SIZE, (42, 18), 5)
    assert doubt[edge].mean() > 2 * doubt[disc(SIZE, (14, 20), 4)].mean()
    assert set(reply["uncertainty"]) == {"liver", "lesion"} and all(
        0 < v < 1 for v in reply["uncertainty"].values()
    )


def test_probabilities_entropy_and_certainty_tell_the_same(trained, volume):
    image = read_image(volume[0])
    found = trained.predict_volume(image, EIGHT_BIT, certainty=True, entropy=True)
    plain = trained.predict_volume(image, EIGHT_BIT)
    assert plain.certainty is None and plain.entropy is None
    np.testing.assert_array_equal(plain.labelmap, found.labelmap)
    values = np.array(list(LABELS.values()))
    for k in range(image.shape[2]):
        p = trained.probabilities(image, EIGHT_BIT, k)
        assert p.shape == (3, *SIZE) and p.dtype == np.float32
        every = np.concatenate([1 - p.sum(0, keepdims=True), p])
        winner = np.where(every.argmax(0) > 0, values[every[1:].argmax(0)], 0)
        np.testing.assert_array_equal(found.labelmap[:, :, k].T, winner)
        sure = np.where(winner > 0, every.max(0), 0)
        assert np.abs(found.certainty[:, :, k].T / 255 - sure).max() < 0.51 / 255 + 1e-4
        every = every.clip(1e-12, 1)
        entropy = -(every * np.log(every)).sum(0) / np.log(4)
        assert np.abs(found.entropy[:, :, k].T / 255 - entropy).max() < 0.51 / 255 + 1e-4


def test_without_a_published_model_it_is_listed_without_labels_and_answers_409(tmp_path, trained):
    task = make_task(tmp_path)
    assert task.is_valid() and task.info()["labels"] == []
    assert "not trained yet" in task.info()["description"] and task.info()["type"] == "segmentation"
    with pytest.raises(InputError, match=r"sam_auto_net.*accept at least 4 cases") as error:
        task.answer({"image": "case.png"})
    assert error.value.status == 409
    save_unet(tmp_path / "unet.safetensors", trained)
    assert task.info()["labels"] == LABELS and "round 2" in task.info()["description"]
    other = make_task(tmp_path, {"kidney": 1})
    with pytest.raises(InputError, match=r"the project has.*kidney") as error:
        other.answer({"image": "case.png"})
    assert error.value.status == 409 and other.info()["labels"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_prompt", "none"),
        ("first_prompt", ["box"]),
        ("second_prompt", "boxes"),
        ("seed_point", "middle"),
        ("dilation", -1),
        ("dilation", 2.5),
        ("dilation", 33),
        ("min_iou", 1.1),
        ("min_iou", True),
        ("min_agreement", "much"),
        ("min_agreement", float("nan")),
        ("label", "kidney"),
        ("labels", ["liver", 3]),
        ("output_uncertainty", "some"),
        ("window_width", 3),
    ],
)
def test_a_wrong_parameter_is_named(task, picture, name, value):
    with pytest.raises(InputError, match=name if name != "window_width" else "window") as error:
        ask(task, picture[0], **{name: value})
    assert error.value.status == 400 and task._encoder.engine.encoded == 0


def test_parameters_as_viewers_send_them_and_defaults():
    sent = {"first_prompt": "points", "second_prompt": "none", "seed_point": "interior", "dilation": "8"}
    scheme = parse_scheme(sent)
    assert (scheme.first, scheme.second, scheme.seed, scheme.dilation) == ("points", "none", "interior", 8)
    assert parse_scheme({"first_prompt": "", "dilation": ""}) == parse_scheme({})
    assert parse_limits({"min_iou": "0.5", "min_agreement": None}).iou == 0.5
    assert parse_names({"label": "", "labels": []}, LABELS) == LABELS
    assert parse_names({"label": "lesion", "labels": "liver"}, LABELS) == {"liver": 3, "lesion": 7}


def test_its_options_are_listed_with_the_default_first(tmp_path):
    config = make_task(tmp_path).config()
    assert config["first_prompt"] == ["box", "points", "positive"]
    assert config["second_prompt"][0] == "points" and set(config["second_prompt"]) > {"none", "box"}
    assert config["seed_point"][0] == "centroid" and config["dilation"] == 0
    assert not set(config) & {"foreground", "label", "roi", "slice"}
