"""A classifier and the SAM that it prompts, learned together, kept in one file, and served."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainers.round
from sam_infer.autocam import CamOptions, auto_cam
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.registry import create_engine
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.geometry import slice_image
from sam_infer.intensity import EIGHT_BIT
from sam_infer.library import ImageLibrary
from sam_infer.networks.classifier import activation_maps, build_classifier, last_maps
from sam_infer.prompts.activation import activation_box, activation_parts
from sam_infer.tasks.automix import AutoMixInfer
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import Tuning
from sam_infer.tuning.mixfile import MixModel, MixNetwork, load_mix, save_mix
from sam_infer.types import Prompts
from sam_infer.volumes import read_image
from tests.cam_data import LABELS, SIZE, as_image, four_kinds, scene, trained
from tests.loop_data import (
    Folder,
    basis,
    one_thread,  # noqa: F401
)
from tests.test_sam_engine import small_sam
from trainers.augment import Augmentation
from trainers.data import accepted_cases
from trainers.mixsteps import MixView, mix_step, prompted_views
from trainers.presence import LabelledCase, presence_slices
from trainers.sam_mix import SamMixTrainer
from trainers.samviews import View
from trainers.split import is_held_out

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = (8, 8, 16, 16)
NAMES = [f"case_{n:03d}" for n in range(16)]
HELD = [name for name in NAMES if is_held_out(name, fraction=0.25)]
QUICK = {"method": "decoder", "iterations": 4, "learning_rate": 0.0003, "batch_size": 2, "max_minutes": 60}
PLAIN = Augmentation(rotation=0, scale=0, shift=0, bend=0, gamma=0, contrast=0, brightness=0, noise=0)


@pytest.fixture(scope="module")
def tiny():
    return create_engine("sam_tiny")


@pytest.fixture(scope="module")
def small():
    return SamEngine(name="small", model=small_sam())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("store"))
    for name, (image, labelmap) in zip(NAMES, four_kinds(range(16)), strict=True):
        folder.add(name, image, labelmap)
    return folder


def trainer(folder, base, **kwargs):
    return SamMixTrainer(
        basis(folder, LABELS, size=SIZE, augmentation=PLAIN), base=base, channels=CHANNELS, **kwargs
    )


def mixed(base, *, encoder="frozen", weight=0.0, training=None):
    """A trained classifier beside a SAM that learned nothing."""
    learner = SamLearner(base.model, tuning=Tuning(encoder=encoder), attention=True)
    with torch.no_grad():
        learner.extras.attention.fill_(weight)
    classifier = build_classifier(labels=2, channels=CHANNELS)
    classifier.load_state_dict(trained().network.state_dict())
    return MixModel(
        network=MixNetwork(learner, classifier).eval(),
        base=base.name,
        digest=base.digest,
        labels=LABELS,
        size=SIZE,
        channels=CHANNELS,
        training=training or {},
    )


@pytest.fixture(scope="module")
def round_one(store, tiny, tmp_path_factory):
    """A round that goes on from a served classifier."""
    task = trainer(tmp_path_factory.mktemp("models"), tiny)
    save_mix(task.path, mixed(tiny, training={"round": 0}))
    before = load_mix(task.path, tiny)
    return task, before, task(QUICK, store)


# Maps from one pass


def test_the_maps_of_one_pass_are_gradcams():
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    network = build_classifier(labels=3, channels=CHANNELS).eval()
    with torch.no_grad():
        network.fc.weight[0].abs_()
        network.fc.weight[2].abs_().neg_()  # nothing is left of ReLU
    images = torch.rand(4, 1, 64, 64)
    logits, maps = activation_maps(network, images)
    torch.testing.assert_close(logits, network(images))
    assert maps.shape == (4, 3, 4, 4) and not maps[:, 2].any() and maps[:, 0].amax((1, 2)).eq(1).all()
    with GradCAM(model=network, target_layers=[last_maps(network)]) as cam:
        for label in range(3):
            oracle = cam(input_tensor=images, targets=[ClassifierOutputTarget(label)] * 4)
            grown = torch.nn.functional.interpolate(maps[:, [label]], (64, 64), mode="bilinear")[:, 0]
            highest = grown.amax((1, 2), keepdim=True)  # the oracle normalises again what it enlarged
            low = grown.amin((1, 2), keepdim=True)
            again = (grown - low) / (highest - low).clamp_min(1e-7)
            np.testing.assert_allclose(again, oracle, atol=1e-4)


def test_only_logits_have_a_gradient_and_no_hook_is_left():
    network = build_classifier(labels=2, channels=CHANNELS)
    logits, maps = activation_maps(network, torch.rand(2, 1, 64, 64))
    assert logits.requires_grad and not maps.requires_grad
    assert not last_maps(network)._forward_hooks


# The step


def view_of(pixels, *, side=SIZE):
    size = pixels.shape
    view = View(case="a", label="disc", size=size, box=None, truth=np.zeros((64, 64), np.uint8))
    return MixView(view=view, pixels=np.zeros((side, side), np.uint8), output=0)


@pytest.mark.parametrize("width, height", [(64, 64), (96, 40)])
def test_learning_is_prompted_as_using_is(width, height):
    model, asked = trained(), 0
    for seed in range(3000, 3006):
        pixels, _ = scene(seed, width=width, height=height)
        image = as_image(pixels, key=(seed, width))
        inputs = model._inputs(image, EIGHT_BIT, [0])
        _, maps = activation_maps(model.network, inputs)
        for n, name in enumerate(LABELS):
            activation = model.activation(image, EIGHT_BIT, 0, name)
            (view,) = prompted_views([view_of(pixels)], maps[:, n], threshold=0.4)
            if activation is None:
                assert not view.given.attention.any()
                continue
            asked += 1
            np.testing.assert_allclose(view.given.box, activation_box(activation), atol=1)
            part = activation_parts(activation)[0]
            assert view.given.attention.dtype == np.float32
            assert (view.given.attention.astype(bool) != part).mean() < 0.01
    assert asked > 8


def test_where_a_map_shows_nothing_learning_takes_the_middle_half():
    (view,) = prompted_views([view_of(np.zeros((41, 81)))], torch.zeros(1, 8, 8), threshold=0.4)
    assert view.given.box == (20, 10, 60, 30)
    assert view.given.attention.shape == (41, 81) and not view.given.attention.any()


def test_the_loss_is_focal_plus_the_weighted_loss_of_masks(store, small):
    """The weight scales one part alone, the gradient of which reaches SAM and not the classifier."""
    task = trainer(store.root / "unused", small)
    views = task._views(round_of(task, store), still=True)
    cases = accepted_cases(store)[:4]
    slices = presence_slices(task.basis.slices(), [LabelledCase(case=case) for case in cases])

    def run(weight):
        learner = SamLearner(small.model, tuning=Tuning(), attention=True)
        torch.manual_seed(0)
        network = MixNetwork(learner, build_classifier(labels=2, channels=CHANNELS)).train()
        state = SimpleNamespace(
            network=network,
            generator=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),
            precision="float32",
        )
        step = mix_step(slices, views, frame=task.frame, batch=2, weight=weight)
        loss = step(state)
        loss.backward()
        slopes = {
            name: p.grad.clone() if p.grad is not None else torch.zeros(1)
            for name, p in network.named_parameters()
            if p.requires_grad
        }
        return loss.item(), slopes

    none, slopes = run(0.0)
    assert not any(s.any() for name, s in slopes.items() if name.startswith("learner"))
    half, one = run(0.5), run(1.0)
    assert half[0] - none == pytest.approx((one[0] - none) / 2, rel=1e-4) and one[0] - none > 0.1
    for name, slope in half[1].items():
        if name.startswith("classifier"):
            torch.testing.assert_close(slope, slopes[name])
    assert half[1]["learner.extras.attention"].any()


def round_of(task, folder):
    """What of a round the preparation asks for."""
    return SimpleNamespace(parts=task.split(folder), counted=lambda stage, cases: cases)


# The round


def test_a_round_goes_on_from_what_is_served_and_says_what_it_came_to(round_one, store):
    task, _, stats = round_one
    assert stats["warm_start"] and stats["trainer"] == "sam_mix"
    assert stats["champion_dice"] > 0.4 and stats["candidate_dice"] > 0.4
    assert stats["candidate_balanced_accuracy"] > 0.8
    assert stats["held_out"] == len(HELD) and stats["slices"] == len(NAMES) - len(HELD)
    assert stats["masks"] == sum(
        len(np.unique(slice_image(read_image(store.root / "labels" / f"{name}.png").array, 0))) - 1
        for name in NAMES
        if name not in HELD
    )
    assert list(stats["box_iou"]) == ["0.2", "0.3", "0.4", "0.5", "0.6"] and stats["box_iou"]["0.4"] > 0.2
    assert json.loads(json.dumps(task.stats()))["round"] == 1
    line = task.publisher.rounds()[-1]
    assert sorted(line["held_out_ids"]) == sorted(HELD) and line["tuning"]["encoder"] == "frozen"


def test_attention_is_learned_and_the_encoder_stands_still(round_one, tiny, store):
    task, before, _ = round_one
    found = []
    task.model, model = lambda *args: found.append(model(*args)) or found[-1], task.model
    try:
        task({**QUICK, "iterations": 1, "warm_start": False, "learning_rate": 0.01}, store)
    finally:
        del task.model
    network = found[0].network
    assert not before.network.learner.extras.attention.any()
    assert network.learner.extras.attention.abs().min() > 0
    encoder = network.learner.sam.image_encoder
    shared = zip(encoder.parameters(), tiny.model.image_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in shared)


def test_the_loss_falls_and_a_killed_round_ends_as_a_whole_one(store, small, tmp_path, monkeypatch):
    request = {**QUICK, "method": "lora", "rank": 2, "iterations": 8, "learning_rate": 0.003}

    class Killed(Exception):
        pass

    def run(folder, kill_at):
        task, found = trainer(folder, small), []
        model = task.model
        task.model = lambda network, training: found.append(network.learned()) or model(network, training)
        keep, kept = trainers.round.Checkpoint.save, []

        def save(self, state):
            keep(self, state)
            kept.append(1)
            if len(kept) == kill_at:
                raise Killed

        monkeypatch.setattr(trainers.round.Checkpoint, "save", save)
        if kill_at:
            with pytest.raises(Killed):
                task(request, store)
        stats = task(request, store)
        monkeypatch.setattr(trainers.round.Checkpoint, "save", keep)
        return stats, found[-1], len(kept)

    monkeypatch.setattr(trainers.round, "KEEP_SECONDS", 0.0)
    whole, weights, _ = run(tmp_path / "whole", 0)
    again, resumed, kept = run(tmp_path / "killed", 3)
    assert kept == 8, "the second run did the other steps alone"
    assert again["loss"] == whole["loss"] and again["candidate_dice"] == whole["candidate_dice"]
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[n], resumed[n]) for n in weights)
    assert any(".lora_A." in name for name in weights) and "learner.extras.attention" in weights
    losses = trainer(tmp_path / "whole", small).stats()
    assert losses["loss"] < first_loss(store, small, tmp_path / "first", request)


def first_loss(store, base, folder, request):
    """The loss of the first step of the same run."""
    return trainer(folder, base)({**request, "iterations": 1}, store)["loss"]


def test_evaluation_prompts_where_the_classifier_looks_whatever_the_truth(round_one, store, monkeypatch):
    task, model, _ = round_one
    parts = task.split(store)
    sent = []
    decode = SliceEncoder.decode

    def spy(self, image, k, window, prompts, **kwargs):
        sent.append((image.key, [p.box for p in prompts], kwargs["zoom"]))
        assert all(p.attention is not None for p in prompts)
        return decode(self, image, k, window, prompts, **kwargs)

    monkeypatch.setattr(SliceEncoder, "decode", spy)
    real = task._score(model, parts)
    right, sent[:] = list(sent), []
    monkeypatch.setattr("trainers.sam_mix.read_labelmap", lambda path, image: np.zeros(image.shape, np.uint8))
    blind = task._score(model, parts)
    assert sent == right and right and not any(zoom for *_, zoom in right)
    assert real.value > 0.4 > blind.value
    boxes = {key: found for key, found, _ in right}
    for case in parts.held_out:
        image = read_image(case.image)
        there = model.classifier.presence(image, EIGHT_BIT)[0] >= 0.5
        looked = [
            model.classifier.activation(image, EIGHT_BIT, 0, name)
            for name, seen in zip(LABELS, there, strict=True)
            if seen
        ]
        assert boxes.get(image.key, []) == [activation_box(one) for one in looked if one is not None]


def test_a_table_adds_images_without_masks(tmp_path, small):
    folder = Folder(tmp_path / "store")
    open_names = [name for name in NAMES if name not in HELD]
    rows = ["image,disc,square"]
    for name, (image, labelmap) in zip(NAMES, four_kinds(range(16)), strict=True):
        folder.add(name, image, labelmap if name in HELD or name == open_names[3] else None)
        rows.append(f"{name}.png,1,")
    csv = tmp_path / "labels.csv"
    csv.write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match="at least 3 cases for training"):
        trainer(tmp_path / "m", small).precheck(folder)
    task = trainer(tmp_path / "m", small, csv=csv)
    task.precheck(folder)
    stats = task({**QUICK, "iterations": 1}, folder)
    assert (stats["training_cases"], stats["csv_cases"]) == (1, len(open_names) - 1)
    assert stats["slices"] == len(open_names)


def test_without_any_mask_there_is_nothing_to_segment(tmp_path, small):
    folder = Folder(tmp_path / "store")
    for name, (image, labelmap) in zip(NAMES, four_kinds(range(16)), strict=True):
        folder.add(name, image, labelmap if name in HELD else labelmap * 0)
    with pytest.raises(InputError, match="none of those for training holds any") as error:
        trainer(tmp_path / "m", small)(QUICK, folder)
    assert error.value.status == 409


@pytest.mark.parametrize(
    "name, value",
    [("method", "adapter"), ("rank", 0), ("segmentation_weight", -1), ("cam_threshold", 0)],
)
def test_wrong_settings_are_named(store, tiny, tmp_path, name, value):
    with pytest.raises(InputError, match=name):
        trainer(tmp_path, tiny).check({name: value})


# The file


@pytest.mark.parametrize("encoder", ["frozen", "lora"])
def test_file_round_trip(small, tmp_path, encoder):
    before = mixed(small, encoder=encoder, weight=0.3, training={"round": 2})
    with torch.no_grad():
        for name, p in before.network.learner.named_parameters():
            if p.requires_grad and ("lora_B" in name or "mask_decoder" in name):
                p.add_(0.01)
    digest = save_mix(tmp_path / "mix.safetensors", before)
    after = load_mix(tmp_path / "mix.safetensors", small)
    image = as_image(scene(5)[0])
    assert after.fingerprint == digest[:16] and after.training["round"] == 2
    assert (after.labels, after.size, after.channels) == (LABELS, SIZE, CHANNELS)
    assert (after.threshold, after.cam_threshold) == (0.5, 0.4)
    np.testing.assert_array_equal(
        after.classifier.presence(image, EIGHT_BIT), before.classifier.presence(image, EIGHT_BIT)
    )
    attention = np.zeros((64, 64), np.float32)
    attention[10:30, 10:30] = 1
    given = Prompts(box=(10, 10, 29, 29), attention=attention)
    one, other = (
        SliceEncoder(engine=m.engine(small)).decode(image, 0, EIGHT_BIT, [given])[0].logits
        for m in (before, after)
    )
    np.testing.assert_array_equal(one, other)
    plain = SliceEncoder(engine=small).decode(image, 0, EIGHT_BIT, [Prompts(box=given.box)])[0].logits
    assert abs(plain - other).max() > 1e-3


def test_a_wrong_base_and_a_damaged_file_are_refused(tiny, small, tmp_path):
    save_mix(tmp_path / "mix.safetensors", mixed(small))
    with pytest.raises(ValueError, match=r"tuned on small.*engine here is sam_tiny"):
        load_mix(tmp_path / "mix.safetensors", tiny)
    content = (tmp_path / "mix.safetensors").read_bytes()
    (tmp_path / "mix.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a usable SAM-Mix file"):
        load_mix(tmp_path / "mix.safetensors", small)
    with pytest.raises(FileNotFoundError):
        load_mix(tmp_path / "none.safetensors", small)


# The task


def infer(folder, base, **kwargs):
    library = ImageLibrary(limit=1 << 24)
    return AutoMixInfer(path=folder / "mix.safetensors", base=base, library=library, labels=LABELS, **kwargs)


def test_the_task_answers_what_was_learned_and_follows_the_file(store, tiny, tmp_path):
    from PIL import Image as PilImage

    task = infer(tmp_path, tiny, store=EmbeddingStore(folder=tmp_path / "embeddings", limit=1 << 24))
    assert task.is_valid() and task.info()["labels"] == []
    pixels, truth = scene(4002, disc=False)
    PilImage.fromarray(pixels).save(tmp_path / "case.png")
    request = {"image": str(tmp_path / "case.png"), "result_extension": ".nrrd"}
    with pytest.raises(InputError, match=r"not trained yet.*POST /train/sam_mix") as error:
        task(request)
    assert error.value.status == 409
    with pytest.raises(InputError, match="sam_auto_mix"):
        task.fingerprint()

    model = mixed(tiny, weight=0.0, training={"round": 1})
    save_mix(tmp_path / "mix.safetensors", model)
    assert task.info()["labels"] == LABELS
    file, reply = task(request)
    found = slice_image(read_image(file).array, 0) == LABELS["square"]
    wanted = truth == LABELS["square"]
    assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.5
    assert reply["label_names"] == {"square": 7} and reply["model"]["name"] == "mix"
    image = read_image(tmp_path / "case.png")
    activation = model.classifier.activation(image, EIGHT_BIT, 0, "square")
    assert tuple(reply["objects"]["square"]["prompts"]["0"]["boxes"][0]) == activation_box(activation)
    first, served = task.fingerprint(), task._served.current()[0]
    task(request)
    assert task._served.current()[0] is served, "loaded once"

    save_mix(tmp_path / "mix.safetensors", mixed(tiny, weight=0.0, training={"round": 2}))
    now = task._served.current()[0]
    assert now is not served and task.fingerprint() != first
    now.encoder.engine.encode = None  # what stood still was embedded before
    assert task(request)[1]["model"]["round"] == 2


def test_attention_reaches_the_engine(tiny):
    image = as_image(scene(4000)[0])
    said = {}
    for weight in (0.0, 0.5):
        model = mixed(tiny, weight=weight)
        for attention in (False, True):
            found = auto_cam(
                image,
                model.classifier,
                encoder=SliceEncoder(engine=model.engine(tiny)),
                window=EIGHT_BIT,
                options=CamOptions(attention=attention),
                zoom=False,
            )
            said[weight, attention] = [found.labels[n].score for n in LABELS]
    assert said[0.0, True] == said[0.0, False] == said[0.5, False]
    assert said[0.5, True] != said[0.5, False]


@pytest.mark.parametrize("name, value", [("cam_threshold", 0), ("labels", ["liver"]), ("cam_every_part", 3)])
def test_wrong_options_are_named(small, tmp_path, name, value):
    save_mix(tmp_path / "mix.safetensors", mixed(small))
    with pytest.raises(InputError, match=name) as error:
        infer(tmp_path, small)({"image": "x.png", name: value})
    assert error.value.status == 400
