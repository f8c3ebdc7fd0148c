"""Trainers that learn from more than accepted masks: pseudo labels, boxes, and agreement with a teacher."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from sam_infer.errors import InputError
from sam_infer.geometry import Region
from sam_infer.networks.unet import load_unet
from sam_infer.overlap import dice
from sam_infer.volumes import read_image
from tests.loop_data import (
    disc,
    one_thread,  # noqa: F401
)
from tests.semi_data import HELD, NAMES, draw_boxes, make_store, make_trainer, truth
from trainers.boxes import BoxStore

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"iterations": 30, "learning_rate": 0.005}


def proposed(store, tag):
    """(48, 48, 1) label maps under a tag, by case."""
    return {p.stem: read_image(p).array for p in sorted((store.root / tag).iterdir())}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    root = tmp_path_factory.mktemp("pseudo")
    store = make_store(root)
    task = make_trainer("pseudo_label", root)
    return store, task, task(QUICK, store)


def test_pseudo_labels_are_kept_under_their_own_tag_with_their_origin(taught):
    store, _, stats = taught
    found = proposed(store, "pseudo_label")
    open_cases = set(store.get_unlabeled_images())
    assert set(found) == open_cases and len(found) == stats["pseudo_labels"] > 3
    assert not set(found) & set(HELD), "nothing that is held out is labelled and learned from"
    for name, array in found.items():
        info = store.get_label_info(name, "pseudo_label")
        origin = info["provenance"]
        assert origin["trainer"] == "pseudo_label" and origin["first_prompt"] == "box"
        assert origin["engine"] == "threshold-1" and origin["dilation"] == 0 and origin["round"] == 1
        if array.any():
            assert info["label_info"] == [{"name": "disc", "idx": 5, "value": 5}]
            assert origin["scores"] == {"disc": 0.9}


def test_pseudo_labels_are_what_the_engine_makes_of_the_cleaned_prediction(taught):
    store, _, _ = taught
    scores = [dice(array == 5, truth(name)) for name, array in proposed(store, "pseudo_label").items()]
    assert np.mean(scores) > 0.9


def test_a_network_trained_on_pseudo_labels_alone_passes_the_gate(taught):
    store, task, stats = taught
    assert stats["published"] and stats["candidate_dice"] > 0.6 and stats["trainer"] == "pseudo_label"
    assert stats["training_cases"] == 4 and not stats["warm_start"]
    served = load_unet(task.path).training
    assert served["trainer"] == "pseudo_label" and served["tag"] == "pseudo_label"
    line = task.publisher.rounds()[0]
    assert line["held_out_ids"] == HELD and line["trainer"] == "pseudo_label"
    assert sorted(p.name for p in (store.root / "labels").iterdir()) == [
        f"{n}.png" for n in sorted(set(NAMES) - set(store.get_unlabeled_images()))
    ]


def test_rounds_of_all_recipes_are_counted_and_judged_together(taught):
    store, task, first = taught
    other = make_trainer("unet", store.root)
    second = other({"iterations": 1, "warm_start": False}, store)
    assert second["round"] == first["round"] + 1 and second["champion_dice"] == first["candidate_dice"]
    assert not second["published"] and task.stats() == first and other.stats() == second


def test_self_training_uses_the_prediction_as_it_is_or_cleaned(tmp_path):
    store = make_store(tmp_path)
    task = make_trainer("self_training", tmp_path)
    parts = {}
    for labels in ("raw", "cleaned"):
        task({"iterations": 8, "labels": labels, "warm_start": False}, store)
        parts[labels] = proposed(store, "self_training")
    assert parts["raw"].keys() == parts["cleaned"].keys()
    differ = 0
    for name, raw in parts["raw"].items():
        cleaned = parts["cleaned"][name]
        assert not (cleaned & ~raw).any(), "cleaning removes and adds nothing"
        differ += bool((cleaned != raw).any())
    assert differ, "8 steps leave islands somewhere"
    assert store.get_label_info(min(parts["raw"]), "self_training")["provenance"]["labels"] == "cleaned"


def test_accepted_masks_can_be_learned_from_too(tmp_path):
    store = make_store(tmp_path)
    task = make_trainer("self_training", tmp_path)
    alone = task({"iterations": 2}, store)
    mixed = task({"iterations": 2, "include_accepted": True, "max_unlabelled": 3}, store)
    assert alone["slices"] == len(store.get_unlabeled_images())
    assert mixed["slices"] == 3 + 4 and mixed["pseudo_labels"] == 3


def test_the_mean_teacher_learns_from_open_cases(tmp_path):
    store = make_store(tmp_path)
    task = make_trainer("mean_teacher", tmp_path)
    stats = task({**QUICK, "consistency": 1.0}, store)
    assert stats["published"] and stats["candidate_dice"] > 0.5
    assert stats["unlabelled_cases"] == len(store.get_unlabeled_images())
    assert not (tmp_path / "mean_teacher").exists(), "it proposes nothing"


@pytest.mark.parametrize("name", ["pseudo_label", "self_training", "mean_teacher"])
def test_without_open_cases_there_is_nothing_to_learn_from(tmp_path, name):
    store = make_store(tmp_path)
    for case in store.get_unlabeled_images():
        store.add_disc(case, NAMES.index(case), value=5)
    with pytest.raises(InputError, match="at least 1 case without a label") as error:
        make_trainer(name, tmp_path).precheck(store)
    assert error.value.status == 409


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    store = make_store(root)
    names = [n for n in store.get_unlabeled_images()][:6]
    draw_boxes(root, [*names, HELD[0]])
    task = make_trainer("weak_box", root)
    return store, names, task, task(QUICK, store)


def test_boxes_alone_teach_the_network(boxed):
    store, names, _, stats = boxed
    assert stats["published"] and stats["candidate_dice"] > 0.6 and stats["boxed_cases"] == len(names)
    found = proposed(store, "weak_box")
    assert sorted(found) == sorted(names), "a box on a held-out case teaches nothing"
    assert all(dice(array == 5, truth(name)) > 0.9 for name, array in found.items())
    origin = store.get_label_info(names[0], "weak_box")["provenance"]
    assert origin["who"] == "ann" and origin["engine"] == "threshold" and origin["scores"] == {"disc": 0.9}
    assert origin["boxes"] == BoxStore(store.root / "boxes").get(names[0]).record()["boxes"]


def test_a_box_that_was_edited_is_filled_anew_and_the_others_are_kept(boxed):
    store, names, task, _ = boxed
    before = {n: (store.root / "weak_box" / f"{n}.png").stat().st_mtime_ns for n in names}
    i, j, _ = (int(v.mean()) for v in np.nonzero(truth(names[0])))
    smaller = Region(low=(i - 2, j - 2, 0), high=(i + 2, j + 2, 0))
    BoxStore(store.root / "boxes").put(names[0], {"disc": [smaller]})
    task({"iterations": 1}, store)
    after = {n: (store.root / "weak_box" / f"{n}.png").stat().st_mtime_ns for n in names}
    assert [n for n in names if before[n] != after[n]] == [names[0]]
    assert (proposed(store, "weak_box")[names[0]] == 5).sum() == 25


def test_too_few_boxes_tell_how_to_give_some(tmp_path):
    store = make_store(tmp_path)
    draw_boxes(tmp_path, ["case_0001"])
    with pytest.raises(InputError, match=r"boxes on at least 3 cases for training, 1 have some \(PUT"):
        make_trainer("weak_box", tmp_path).precheck(store)


def test_a_box_beyond_an_image_that_was_replaced_is_named(tmp_path):
    store = make_store(tmp_path)
    names = store.get_unlabeled_images()[:3]
    draw_boxes(tmp_path, names)
    PilImage.fromarray(disc(1, width=20, height=20)[0]).save(tmp_path / "images" / f"{names[0]}.png")
    with pytest.raises(InputError, match=f"boxes of disc = .* lies outside {names[0]}") as error:
        make_trainer("weak_box", tmp_path)({"iterations": 1}, store)
    assert error.value.status == 409


@pytest.mark.parametrize(
    ("trainer", "name", "value"),
    [
        ("pseudo_label", "first_prompt", "none"),
        ("pseudo_label", "second_prompt", "circle"),
        ("pseudo_label", "seed_point", ""),
        ("pseudo_label", "dilation", -1),
        ("pseudo_label", "min_iou", 1.5),
        ("pseudo_label", "max_unlabelled", 0),
        ("pseudo_label", "include_accepted", 2),
        ("self_training", "labels", "smooth"),
        ("mean_teacher", "consistency", "much"),
        ("weak_box", "include_accepted", "perhaps"),
        ("weak_box", "precision", "int8"),
        ("weak_box", "tracking", "http://elsewhere"),
    ],
)
def test_bad_settings_are_named(tmp_path, trainer, name, value):
    with pytest.raises(InputError, match=f"^{name} = "):
        make_trainer(trainer, tmp_path).check({name: value})


@pytest.mark.parametrize("name", ["unet", "pseudo_label", "self_training", "mean_teacher", "weak_box"])
def test_the_defaults_that_viewers_show_are_accepted(tmp_path, name):
    task = make_trainer(name, tmp_path)
    task.check(task.config())


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_curves_are_written_where_asked(tmp_path, kind):
    store = make_store(tmp_path)
    task = make_trainer("unet", tmp_path)
    task({"iterations": 4, "tracking": kind}, store)
    folder = tmp_path / "model" / kind
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "unet-1")).Reload()
        assert len(events.Scalars("training/loss")) == 4
        assert [e.value for e in events.Scalars("candidate_dice")] == pytest.approx(
            [task.stats()["candidate_dice"]], abs=1e-4
        )
    else:
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{folder / 'runs.db'}")
        (run,) = client.search_runs([client.get_experiment_by_name("samloop").experiment_id])
        assert len(client.get_metric_history(run.info.run_id, "training/loss")) == 4
        assert run.data.params["iterations"] == "4" and run.info.status == "FINISHED"


def test_nothing_is_tracked_by_default(tmp_path):
    task = make_trainer("unet", tmp_path)
    task({"iterations": 1}, make_store(tmp_path))
    assert not {"tensorboard", "mlflow"} & {p.name for p in (tmp_path / "model").iterdir()}


@pytest.mark.slow
def test_each_trainer_survives_being_killed_anywhere(tmp_path):
    argv = [sys.executable, "-m", "tests.kill_trainers", str(tmp_path)]
    done = subprocess.run(argv, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (whole, killed) in json.loads(done.stdout.splitlines()[-1]).items():
        assert killed["kills"] >= 3, name
        assert (killed["loss"], killed["reached"]) == (whole["loss"], whole["reached"]), name
        assert killed["weights"] == whole["weights"], name
        assert killed["labels"] and not killed["left"], name
