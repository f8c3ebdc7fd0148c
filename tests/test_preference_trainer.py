"""The trainer that learns from what people preferred, and the task that answers with what it learned."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

import trainers.preference as module
import trainers.round
from sam_infer.candidates import by_thresholds, overlaps
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError
from sam_infer.intensity import EIGHT_BIT
from sam_infer.library import ImageLibrary
from sam_infer.overlap import dice
from sam_infer.tasks.autotext import AutoTextInfer
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import METHODS
from sam_infer.tuning.tunedfile import load_tuned
from sam_infer.types import Prompts
from tests.loop_data import basis
from tests.sam_data import LABELS, Bright, halo, halo_store, label_texts, picture, rate, small_base
from trainers.loop import Settings, train
from trainers.preference import FEEDBACK, PreferenceTrainer
from trainers.preferences import PreferenceStore
from trainers.rated import rated_by_people, rated_by_truth, rated_step, reference_logits
from trainers.samviews import Frame, given_view
from trainers.split import is_held_out

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [f"case_{n:04d}" for n in range(9)]
HELD = [name for name in NAMES if is_held_out(name, fraction=0.25)]
#: Of nine cases the first six are accepted; the others are open.
TRAINED = [name for name in NAMES[:6] if name not in HELD]
OPEN = [name for name in NAMES[6:] if name not in HELD]
SLIGHT = {"iterations": 2, "batch_size": 2, "learning_rate": 0.001, "aligning_iterations": 2}
BOX = Prompts(box=(12.0, 8.0, 33.0, 29.0))


class Remembering(PreferenceTrainer):
    """Keeps what both stages of the last round came to."""

    before = None

    def _policy(self, reference, seed):
        self.before = reference.learned()
        return super()._policy(reference, seed)

    def model(self, network, training):
        self.after = network.learned()
        return super().model(network, training)


def trainer(root, *, base=None, prompter=None, texts=None):
    prompter, texts = prompter or Bright(), texts or label_texts(root)
    return Remembering(
        basis(root / "model", LABELS),
        base=base or small_base(),
        store=None,
        prompters={"bright": prompter},
        texts=lambda: texts,
        preferences=PreferenceStore(root / "preferences"),
    )


@pytest.fixture
def store(tmp_path):
    assert len(TRAINED) >= 3 and OPEN and set(NAMES[:6]) & set(HELD)
    return halo_store(tmp_path, 9, accepted=6)


def rated_view(grey, given=BOX, truth=None):
    frame = Frame(framing=small_base().framing, side=256, grid=16)
    view = given_view(
        picture(grey), 0, EIGHT_BIT, given, truth=truth, case="a", label="halo",
        encoder=SliceEncoder(engine=small_base()), frame=frame, still=True,
    )  # fmt: skip
    return view, frame


# What is learned from a rating


@pytest.mark.parametrize("best_first", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_answers_move_towards_what_was_preferred(tmp_path, best_first):
    entry = rate(PreferenceStore(tmp_path), "a", ranking=best_first)
    reference = SamLearner(small_base().model, tuning=METHODS["decoder"])
    view, frame = rated_view(halo(0)[0], entry.asked.prompts)
    masks = entry.asked.candidates.masks
    rated = rated_by_people(reference, view, masks, entry.answer.scores, frame)
    grown = 1 if best_first[0] == 0 else -1
    assert rated.c.shape == (64, 64) and (rated.c * grown).min() > -1e-6 and (rated.c * grown).max() > 1
    assert not rated.c[34 * 64 // 40 :].any(), "below the candidates, and beyond the slice"
    policy = SamLearner(small_base().model, tuning=METHODS["decoder"])
    step = rated_step([rated], frame=frame, batch=4, temperature=10)
    run = train(policy, step, Settings(iterations=6, epochs=6, learning_rate=0.001, ema=0.0))
    assert run.losses[0] == pytest.approx(np.log(2), abs=1e-3), "it begins where the reference is"
    assert run.losses[-1] < run.losses[0] - 0.05
    moved = reference_logits(run.network, [view], frame)[0] - rated.reference
    assert float((moved * rated.c).sum()) > 0


def test_what_is_learned_is_the_mask_that_the_engine_answers_with():
    engine = small_base()
    point = {"points": np.array([[20, 17]], np.float32), "point_labels": np.array([1])}
    served = []
    for given in (Prompts(**point), Prompts(**point, box=BOX.box)):
        view, frame = rated_view(halo(0)[0], given)
        low = reference_logits(SamLearner(engine.model, tuning=METHODS["decoder"]), [view], frame)
        found = engine.decode(view.embedding.unpacked(), [given])[0]
        native = engine.framing.native(low[:, None], view.size, engine.model)[0, 0].numpy()
        np.testing.assert_allclose(native, found.logits[found.best], atol=2e-3)
        served.append(len(found.logits))
    assert served == [3, 1], "one click is answered with the best of three"


@pytest.mark.parametrize("source", ["thresholds", "masks", "dropout"])
def test_candidates_of_every_source_are_ranked_by_the_accepted_mask(source):
    grey, mask = halo(1)
    view, frame = rated_view(grey, truth=mask)
    reference = SamLearner(small_base().model, tuning=METHODS["decoder"])
    with torch.no_grad():
        reference.sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(50)
    one, again, other = (
        rated_by_truth(reference, [view], frame, source=source, seed=seed)[0].c for seed in (0, 0, 1)
    )
    assert one.any() and torch.equal(one, again)
    assert torch.equal(one, other) == (source != "dropout"), "chance decides what drops out, and nothing else"


def test_the_accepted_mask_ranks_the_models_candidates():
    grey, mask = halo(1)
    view, frame = rated_view(grey, truth=mask)
    reference = SamLearner(small_base().model, tuning=METHODS["decoder"])
    with torch.no_grad():  # a random decoder is sure of nothing; spread its answers out
        reference.sam.mask_decoder.output_hypernetworks_mlps[0].layers[-1].weight.mul_(40)
    (rated,) = rated_by_truth(reference, [view], frame)
    candidates = by_thresholds(torch.sigmoid(rated.reference).numpy()).masks
    inside = np.zeros((64, 64), bool)
    inside[: round(40 * 64 / 48)] = True
    found = overlaps(candidates & inside, view.truth > 127)
    order = np.argsort(-found, kind="stable")
    best = (candidates & inside)[order].astype(float)
    wanted = best[0] - best[3] + 0.5 * (best[1] - best[2])
    assert len(set(found.tolist())) > 1 and rated.c.any()
    np.testing.assert_allclose(rated.c.numpy(), wanted, atol=1e-6)
    assert not rated.c[~torch.from_numpy(inside)].any(), "nothing is learned beyond the slice"


# A round


def test_the_second_stage_changes_the_mask_decoder_alone(store, tmp_path):
    for method in ("decoder", "adapter"):
        task = trainer(tmp_path / method)
        rate(task.preferences, OPEN[0])
        stats = task({**SLIGHT, "method": method}, store)
        assert stats["aligned"]
        base = SamLearner(small_base().model, tuning=METHODS[method], text=6).learned()
        first = {name for name in base if not torch.equal(task.before[name], base[name])}
        assert {name.split(".")[0] for name in first} == {"sam", "extras"}
        second = {name for name in base if not torch.equal(task.after[name], task.before[name])}
        assert second and all(name.startswith("sam.mask_decoder.") for name in second)


@pytest.mark.parametrize(("feedback", "people", "accepted"), zip(FEEDBACK, (2, 2, 0), (1, 0, 1), strict=True))
def test_what_may_be_learned_from_is_counted(store, tmp_path, caplog, feedback, people, accepted):
    task = trainer(tmp_path)
    for name in (TRAINED[0], OPEN[0], HELD[0], "unknown"):
        rate(task.preferences, name)
    rate(task.preferences, OPEN[0], label="unheard of")
    rate(task.preferences, TRAINED[1], size=(30, 30))
    with caplog.at_level(logging.WARNING):
        stats = task({**SLIGHT, "feedback": feedback}, store)
    assert stats["aligned"] and stats["slices"] == len(TRAINED)
    assert stats["rated_by_people"] == people
    assert stats["rated_by_accepted_masks"] == accepted * len(TRAINED)
    left_out = f"{TRAINED[1]} was replaced since its candidates were rated; left out"
    assert (left_out in caplog.text) == bool(people)


def test_without_a_preference_the_first_stage_is_the_result(store, tmp_path):
    task = trainer(tmp_path)
    stats = task({**SLIGHT, "feedback": "people"}, store)
    assert not stats["aligned"] and task.before is None
    rate(task.preferences, OPEN[0], ranking=(0, 1, 2, 3))
    assert task({**SLIGHT, "feedback": "people"}, store)["aligned"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["given_step", "rated_step"])
def test_a_killed_round_ends_with_what_it_would_have_learned(store, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(trainers.round, "KEEP_SECONDS", 0.0)
    request = {**SLIGHT, "iterations": 3, "aligning_iterations": 3}
    whole, killed = trainer(tmp_path / "whole"), trainer(tmp_path / "killed")
    for task in (whole, killed):
        task.preferences.answer(waiting(task), ratings=[5, 4, 1, 1])
    stats, make = whole(request, store), getattr(module, stage)

    def dying(*args, **kwargs):
        inner = make(*args, **kwargs)

        def step(state):
            if state.iteration == 2:
                raise Killed
            return inner(state)

        return step

    monkeypatch.setattr(module, stage, dying)
    with pytest.raises(Killed):
        killed(request, store)
    monkeypatch.setattr(module, stage, make)
    again = killed(request, store)
    assert all(torch.equal(value, whole.after[name]) for name, value in killed.after.items())
    assert {**again, "total_time": ""} == {**stats, "total_time": ""}


def waiting(task):
    entry = rate(PreferenceStore(task.path.parent / "scratch"), OPEN[0])
    asked = entry.asked
    return task.preferences.put_candidates(
        asked.image_id, label=asked.label, k=0, candidates=asked.candidates, prompts=asked.prompts,
        fingerprint="e-1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The shipped SAM, which learned that what is asked for is larger than the box around the bright disc."""
    root = tmp_path_factory.mktemp("taught")
    store = halo_store(root, 9, accepted=6)
    task = trainer(root, base=create_engine("sam_tiny"))
    request = {"iterations": 16, "batch_size": 4, "learning_rate": 0.002, "aligning_iterations": 3}
    return store, task, task(request, store)


def test_a_better_model_is_published_with_the_texts_that_it_learned(taught):
    _, task, stats = taught
    assert stats["published"] and stats["candidate_dice"] > stats["champion_dice"] + 0.1
    assert stats["held_out"] == len(set(HELD) & set(NAMES[:6])) and stats["prompts"] == "bright"
    model = load_tuned(task.path, task.base)
    assert model.texts == task.texts().record(LABELS)
    assert model.texts["descriptions"] == {"halo": "a dark ring around a bright disc"}
    assert model.network.extras.text_width == 6 and model.network.extras.attention is None


def again(taught, **changes):
    """The served model in the hands of a trainer that differs."""
    _, task, _ = taught
    other = trainer(task.path.parent.parent, base=task.base, **changes)
    plan = other._plan({"iterations": 1})
    return other._champion(plan), plan, other


def test_a_round_starts_from_a_model_with_the_same_texts_only(taught):
    model, plan, other = again(taught)
    assert model.fingerprint and other._continues(model, plan)
    for request in ({"text": False}, {"method": "lora"}):
        assert not other._continues(model, other._plan(request)), request


@pytest.mark.parametrize("changed", [{"text": "something else"}, {"letters": "aeinstr"}])
def test_a_model_whose_texts_changed_is_no_champion(taught, tmp_path, changed):
    texts = label_texts(tmp_path, **changed)
    model, plan, other = again(taught, texts=texts)
    assert not model.fingerprint and not other._continues(model, plan)
    store, task, first = taught
    score = other._score(model, task.split(store))
    assert round(score.value, 4) == first["champion_dice"], "it is compared with the base"


def test_a_model_without_its_prompts_is_no_champion(taught):
    prompter = Bright()
    other = trainer(taught[1].path.parent.parent, base=taught[1].base, prompter=prompter)
    plan = other._plan({})
    prompter.there = False
    assert not other._champion(plan).fingerprint


def test_without_text_nothing_is_said(store, tmp_path):
    task = trainer(tmp_path, texts=label_texts(tmp_path, None))
    with pytest.raises(InputError, match="label = 'halo': nothing is known about it in words"):
        task.check({})
    task({**SLIGHT, "text": False}, store)
    assert not any(name.startswith("extras.") for name in task.after)


def test_what_cannot_be_trained_is_told_at_once(store, tmp_path):
    prompter = Bright("halo")
    task = trainer(tmp_path, prompter=prompter)
    for name, value in (
        ("prompts", "clip"), ("feedback", "nobody"), ("aligning_iterations", 0), ("temperature", -1),
        ("text", "maybe"), ("method", "other"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^{name} = ") as error:
            task.check({name: value})
        assert error.value.status == 400
    task.check(task.config())
    prompter.there = False
    with pytest.raises(InputError, match=r"^prompts = 'bright': not trained yet") as error:
        task.check({})
    assert error.value.status == 409
    prompter.there = True
    prompter.parts = lambda *_: {}
    with pytest.raises(InputError, match="it sees none of the labels on the accepted cases") as error:
        task(SLIGHT, store)
    assert error.value.status == 409


# What answers


def infer(taught, *, prompter=None, texts=None, path=None, labels=LABELS):
    _, task, _ = taught
    texts = texts or task.texts()
    return AutoTextInfer(
        path=path or task.path,
        base=task.base,
        store=None,
        prompters={"bright": prompter or Bright()},
        texts=lambda: texts,
        library=ImageLibrary(limit=1 << 24, ct=None, other=None),
        labels=labels,
    )


def test_the_task_answers_with_the_published_model(taught):
    store, task, _ = taught
    name, task = HELD[0], infer(taught)
    request = {"image": str(store.root / "images" / f"{name}.png"), "output_uncertainty": True}
    file, facts = task.answer(request)
    found = np.array(PilImage.open(io.BytesIO(b"".join(file.parts))))
    assert dice(found == 5, halo(NAMES.index(name))[1]) > 0.6
    assert facts["label_names"] == {"halo": 5} and facts["missing"] == {}
    assert facts["objects"]["halo"]["slices"] == [0] and facts["prompts"] == "bright"
    assert facts["texts"] == {"halo": "a dark ring around a bright disc"}
    assert facts["model"]["name"] == "preference" and facts["model"]["round"] == 1
    assert 0 < facts["uncertainty"]["halo"] < 1 and facts["engine"] == "sam_tiny"
    assert facts["model"]["fingerprint"] in task.fingerprint() and "bright-1" in task.fingerprint()
    assert task.info()["labels"]


def refused(task, image):
    with pytest.raises(InputError) as error:
        task.answer({"image": str(image)})
    assert error.value.status == 409
    return str(error.value)


def test_what_cannot_answer_says_why(taught, tmp_path):
    image = taught[0].root / "images" / f"{NAMES[0]}.png"
    untrained = infer(taught, path=tmp_path / "nothing.safetensors")
    assert "not trained yet: accept at least 4 cases" in refused(untrained, image)
    assert untrained.info()["labels"] == [] and "POST /train/preference" in untrained.info()["description"]
    with pytest.raises(InputError, match="not trained yet"):
        untrained.fingerprint()
    other = infer(taught, texts=label_texts(tmp_path, "something else"))
    assert "texts = 'descriptions': is not what the model learned with" in refused(other, image)
    other = infer(taught, texts=label_texts(tmp_path, letters="aeinstr"))
    assert "texts = 'encoder'" in refused(other, image)
    prompter = Bright()
    prompter.there = False
    assert "prompts = 'bright': not trained yet" in refused(infer(taught, prompter=prompter), image)
    assert "has labels {'halo': 5}" in refused(infer(taught, labels={"halo": 1}), image)
