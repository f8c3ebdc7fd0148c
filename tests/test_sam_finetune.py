"""The trainer of the SAM that answers clicks: what learns, what is judged, and what is served of it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trainers.round
import trainers.sam_finetune as module
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.registry import create_engine
from sam_infer.engines.tuned import TunedEngine
from sam_infer.errors import InputError
from sam_infer.intensity import EIGHT_BIT
from sam_infer.overlap import dice
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import METHODS
from sam_infer.tuning.tunedfile import save_tuned, untuned
from sam_infer.types import Prompts
from tests.conftest import disc
from tests.loop_data import basis
from tests.sam_data import LABELS, halo, halo_store, picture, small_base
from trainers.checkpoint import Checkpoint
from trainers.loop import Settings, train
from trainers.sam_finetune import SamFinetuneTrainer
from trainers.samgiven import asked_of, given_masks
from trainers.samsteps import clinical, tuning_step
from trainers.samviews import HALF, Frame, features_of, given_view, object_views
from trainers.split import is_held_out

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = ("box_dice", "click_dice", "clicks3_dice")
FEW = [f"case_{n:04d}" for n in range(5)]
HELD = {name for name in FEW if is_held_out(name, fraction=0.25)}
SLIGHT = {"iterations": 2, "batch_size": 1, "learning_rate": 1e-6}


class Remembering(SamFinetuneTrainer):
    """Keeps what the last round came to, published or not."""

    def model(self, network, training):
        self.made = network.learned()
        return super().model(network, training)


def trainer(folder, *, base=None, **kwargs):
    return Remembering(basis(folder / "model", LABELS), base=base or small_base(), **kwargs)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Five accepted cases, two of them held out."""
    return halo_store(tmp_path_factory.mktemp("few"), len(FEW))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Two rounds on the shipped SAM: one that learns what a halo is, one that spoils it."""
    root = tmp_path_factory.mktemp("rounds")
    store = halo_store(root, 8)
    task = trainer(root, base=create_engine("sam_tiny"))
    first = task({"iterations": 20, "batch_size": 2, "learning_rate": 0.002}, store)
    served = task.path.read_bytes()
    second = task({"iterations": 2, "batch_size": 1, "learning_rate": 1.0, "warm_start": False}, store)
    return task, first, served, second


def test_a_better_model_is_published_and_answers_clicks(rounds):
    task, first, _, _ = rounds
    assert first["published"] and "better than the served model" in first["reason"]
    assert first["candidate_prompted_dice"] > first["champion_prompted_dice"] + 0.1
    engine, seen = TunedEngine(base=task.base, path=task.path, labels=LABELS), {}
    image, mask = halo(99)
    pixels = image.astype(np.float32) / 255
    y, x = np.argwhere(mask).mean(0)
    click = Prompts(points=np.array([[x, y]], np.float32), point_labels=np.array([1]))
    for one in (task.base, engine):
        seen[one] = dice(one.decode(one.encode(pixels), [click])[0].mask(), mask)
    assert seen[engine] > seen[task.base] + 0.1
    assert engine.current()[0].training["round"] == 1


def test_a_worse_model_is_refused_and_what_serves_stays(rounds):
    task, first, served, second = rounds
    assert not second["published"] and task.path.read_bytes() == served
    assert second["champion_prompted_dice"] == first["candidate_prompted_dice"] == second["best_metric"]
    assert not list(task.path.parent.glob("*-candidate*"))


def test_candidate_and_champion_are_told_by_box_and_by_clicks(rounds):
    _, first, _, second = rounds
    for stats in (first, second):
        for whose in ("candidate", "champion"):
            values = [stats[f"{whose}_{figure}"] for figure in FIGURES]
            assert stats[f"{whose}_prompted_dice"] == pytest.approx(np.mean(values), abs=1e-3)
    assert [second[f"champion_{f}"] for f in FIGURES] == [first[f"candidate_{f}"] for f in FIGURES]


def test_what_is_held_out_is_in_no_view(few, tmp_path, monkeypatch):
    task, seen, step = trainer(tmp_path), [], module.tuning_step
    monkeypatch.setattr(module, "tuning_step", lambda views, **kw: seen.extend(views) or step(views, **kw))
    stats = task(SLIGHT, few)
    assert {view.case for view in seen} == set(FEW) - HELD
    line = task.publisher.rounds()[0]
    assert set(line["held_out_ids"]) == HELD and not HELD & set(line["training_ids"])
    assert (stats["training_cases"], stats["held_out"], stats["slices"]) == (3, 2, len(seen))


def some_views(*, still, count=2):
    frame = Frame(framing=small_base().framing, side=256, grid=16)
    encoder, views = SliceEncoder(engine=small_base()), []
    for seed in range(count):
        image, mask = halo(seed)
        whole = picture(image)
        views += object_views(
            whole, mask.T[:, :, None] * 5, case=f"c{seed}", labels=LABELS, encoder=encoder,
            window=EIGHT_BIT, frame=frame, still=still, rng=np.random.default_rng(seed),
        )  # fmt: skip
    return views, frame


@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_a_method_names_learns(method):
    views, frame = some_views(still=method == "decoder")
    learner = SamLearner(small_base().model, tuning=METHODS[method], seed=0)
    before = copy.deepcopy(learner.state_dict())
    own = {name for name, one in learner.named_parameters() if one.requires_grad}
    base = {name: value.clone() for name, value in small_base().model.state_dict().items()}
    settings = Settings(iterations=3, epochs=1, learning_rate=0.01, ema=0.5)
    run = train(learner, tuning_step(views, frame=frame, batch=2), settings)
    after = run.network.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved <= own
    prompts = {n for n in own - moved if "prompt_encoder" in n}
    assert prompts == own - moved, "what no prompt of these steps needed"
    assert all(torch.equal(value, base[n]) for n, value in small_base().model.state_dict().items())


def test_views_hold_what_the_encoder_needs():
    kept, _ = some_views(still=True)
    pixels, frame = some_views(still=False)
    assert all(view.embedding is not None and view.values is None for view in kept)
    assert all(view.embedding is None and view.values.dtype == np.uint8 for view in pixels)
    learner = SamLearner(small_base().model, tuning=METHODS["full"]).eval()
    with torch.no_grad():
        seen = [features_of(views, learner.sam, frame, torch.device("cpu")) for views in (kept, pixels)]
    torch.testing.assert_close(*seen, atol=0.01, rtol=0.01)


def test_an_object_too_small_for_the_grid_is_seen_in_crops_alone():
    frame = Frame(framing=small_base().framing, side=256, grid=16)
    mask = disc((300, 400), (200, 150), 2)
    image = picture(np.where(mask, 220, 60).astype(np.uint8))
    views = object_views(
        image, mask.T[:, :, None] * 5, case="a", labels=LABELS, encoder=SliceEncoder(engine=small_base()),
        window=EIGHT_BIT, frame=frame, still=False, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert views and all(max(view.size) < 100 and view.truth.max() > HALF for view in views)
    asked = clinical(views, frame, np.random.default_rng(1), torch.device("cpu"))
    scale = frame.side / frame.low
    for place, truth in zip(asked.first[len(views) :], asked.truth[len(views) :], strict=True):
        column, row = ((place + 0.5) / scale - 0.5).round().int().tolist()
        assert truth[row, column] > 0.5, "the click is in the object"


def test_each_large_part_of_a_label_is_an_object_beside_the_whole():
    frame = Frame(framing=small_base().framing, side=256, grid=16)
    left, right, speck = disc((200, 300), (70, 100), 30), disc((200, 300), (220, 100), 25), (3, 3)
    mask = left | right
    mask[speck] = True
    views = object_views(
        picture(np.where(mask, 220, 60).astype(np.uint8)), mask.T[:, :, None] * 5, case="a", labels=LABELS,
        encoder=SliceEncoder(engine=small_base()), window=EIGHT_BIT, frame=frame, still=False,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    boxes = {view.box for view in views if view.size == (200, 300)}
    whole = (3.0, 3.0, 245.0, 130.0)
    assert boxes == {whole, (40.0, 70.0, 100.0, 130.0), (195.0, 75.0, 245.0, 125.0)}


def test_training_sees_the_answers_that_are_served():
    """The same prompts give the same logits through the trainer's decoding and through the engine."""
    learner = SamLearner(small_base().model, tuning=METHODS["decoder"], text=6, attention=True).eval()
    with torch.no_grad():
        for value in learner.extras.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    engine = small_base().with_model(learner.served(), extras=learner.extras, same_encoder=True)
    grey, mask = halo(3)
    image, frame = picture(grey), Frame(framing=engine.framing, side=256, grid=16)
    encoder = SliceEncoder(engine=engine)
    text, attention = np.linspace(-1, 1, 6, dtype=np.float32), grey.astype(np.float32) / 255
    points = {"points": np.array([[20, 12], [3, 30]], np.float32), "point_labels": np.array([1, 0])}
    for given in (
        Prompts(box=(10, 5, 30, 27)),
        Prompts(box=(10, 5, 30, 27), **points),
        Prompts(**points),
        Prompts(box=(10, 5, 30, 27), text=text, attention=attention),
    ):
        view = given_view(
            image, 0, EIGHT_BIT, given, truth=mask, case="a", label="halo", encoder=encoder, frame=frame,
            still=True,
        )  # fmt: skip
        asked = asked_of([view, view], frame, torch.device("cpu"))
        with torch.no_grad():
            masks, iou = given_masks(learner, [view, view], asked, frame)
            wide = frame.framing.native(masks[:1, :1], mask.shape, learner.sam)[0, 0].numpy()
        found = encoder.decode(image, 0, EIGHT_BIT, [given])[0]
        np.testing.assert_allclose(found.logits[0], wide, atol=1e-3)
        assert found.iou[0] == pytest.approx(float(iou[0, 0].clamp(0, 1)), abs=1e-4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["decoder", "adapter"])
def test_a_killed_round_ends_with_what_it_would_have_learned(few, tmp_path, monkeypatch, method):
    monkeypatch.setattr(trainers.round, "KEEP_SECONDS", 0.0)
    request = {"iterations": 4, "batch_size": 1, "learning_rate": 0.003, "method": method}
    whole, killed = trainer(tmp_path / "whole"), trainer(tmp_path / "killed")
    stats, step = whole(request, few), module.tuning_step

    def dying(*args, **kwargs):
        inner = step(*args, **kwargs)

        def once(state):
            if state.iteration == 2:
                raise Killed
            return inner(state)

        return once

    monkeypatch.setattr(module, "tuning_step", dying)
    with pytest.raises(Killed):
        killed(request, few)
    kept = torch.load(tmp_path / "killed" / "model" / "sam_finetune-work" / "training.pt", weights_only=True)
    names = [name for name, _ in small_base().model.image_encoder.named_parameters()]
    for part in ("network", "average"):
        assert not {f"sam.image_encoder.{name}" for name in names} & kept[part].keys(), "the base is not kept"
    monkeypatch.setattr(module, "tuning_step", step)
    again = killed(request, few)
    assert all(torch.equal(value, whole.made[name]) for name, value in killed.made.items())
    assert {n: again[n] for n in again if n != "total_time"} == {
        n: stats[n] for n in stats if n != "total_time"
    }


def published(task, tuning, labels=LABELS):
    """A model is served whose decoder was moved a little."""
    learner = SamLearner(task.base.model, tuning=tuning, seed=5)
    with torch.no_grad():
        for value in learner.parameters():
            if value.requires_grad:
                value.add_(0.01)
    save_tuned(task.path, replace(untuned(task.base, labels=labels, training={"round": 1}), network=learner))
    return learner.learned()


def test_only_a_model_of_the_same_tuning_is_started_from(few, tmp_path):
    task = trainer(tmp_path)
    start = published(task, METHODS["decoder"])
    for request, warm in (
        ({"rank": 4}, True),
        ({"method": "adapter"}, False),
        ({"warm_start": False}, False),
    ):
        assert task({**SLIGHT, **request}, few)["warm_start"] is warm, request
        if warm:
            assert all(torch.allclose(task.made[n], start[n], atol=1e-4) for n in start)
        published(task, METHODS["decoder"])
    published(task, METHODS["lora"])
    assert not task({**SLIGHT, "method": "lora", "rank": 4}, few)["warm_start"]
    published(task, METHODS["decoder"], labels={"other": 5})
    other = task(SLIGHT, few)
    assert not other["warm_start"] and other["champion_prompted_dice"] is not None, "judged against the base"


def test_a_model_of_another_base_is_not_looked_at(few, tmp_path):
    published(trainer(tmp_path / "a", base=create_engine("sam_tiny")), METHODS["decoder"])
    found, alone = (trainer(tmp_path / name)(SLIGHT, few) for name in ("a", "b"))
    assert not found["warm_start"]
    assert [found[f"champion_{f}"] for f in FIGURES] == [alone[f"champion_{f}"] for f in FIGURES]


def test_embeddings_on_disk_are_used_again(few, tmp_path, monkeypatch):
    store = EmbeddingStore(folder=tmp_path / "kept", limit=1 << 30, reserve=0)
    trainer(tmp_path / "a", store=store)(SLIGHT, few)
    monkeypatch.setattr(type(small_base()), "encode", lambda *_: pytest.fail("encoded again"))
    trainer(tmp_path / "b", store=store)(SLIGHT, few)


def test_accepted_cases_without_a_label_teach_nothing(tmp_path):
    store = halo_store(tmp_path, len(FEW))
    for name in set(FEW) - HELD:
        image, mask = halo(0)
        store.add(name, image, mask * 0)
    with pytest.raises(InputError, match="none of those for training holds any of the labels") as error:
        trainer(tmp_path)(SLIGHT, store)
    assert error.value.status == 409


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "prompt"), ("method", None), ("rank", 0), ("rank", 2.5), ("rank", "many"),
        ("iterations", 0), ("learning_rate", 2), ("batch_size", 65), ("warm_start", "perhaps"),
        ("precision", "int8"), ("device", "tpu"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(few, tmp_path, name, value):
    task = trainer(tmp_path)
    for call in (lambda: task.check({name: value}), lambda: task({name: value}, few)):
        with pytest.raises(InputError, match=f"^{name} = ") as error:
            call()
        assert error.value.status == 400
    task.check(task.config())


def test_the_file_of_adapters_holds_only_what_learned(few, tmp_path):
    task = trainer(tmp_path)
    published(task, METHODS["adapter"])
    own = {f"sam.{name}" for name, _ in task.base.model.named_parameters()}
    kept = load_file(task.path).keys()
    assert {name for name in kept & own if "image_encoder" in name} == set()
    assert task({**SLIGHT, "method": "adapter"}, few)["warm_start"]


def test_what_does_not_learn_is_shared_with_the_average_and_not_kept(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    network[0].requires_grad_(False)
    still, averages = network[0].weight.clone(), []

    def step(state):
        averages.append(state.average)
        assert state.average[0].weight.data_ptr() == state.network[0].weight.data_ptr()
        assert state.average[2].weight.data_ptr() != state.network[2].weight.data_ptr()
        return state.network(torch.randn(4, 3, generator=state.generator)).square().mean()

    checkpoint = Checkpoint(path=tmp_path / "state.pt", key="k", every=0)
    run = train(network, step, Settings(iterations=3, epochs=1), checkpoint=checkpoint)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    learned = {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert kept["network"].keys() == learned | {f"1.{n}" for n in dict(network[1].named_buffers())}
    assert len(kept["optimiser"]["state"]) == len(learned)
    assert run.network is averages[0] and torch.equal(run.network[0].weight, still)
    assert not torch.equal(run.network[1].running_mean, torch.zeros(3)), "statistics follow"
