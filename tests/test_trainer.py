import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.samloop.project import load_project
from sam_infer.errors import InputError
from sam_infer.networks.unet import UnetModel, load_unet
from tests.loop_data import (
    Folder,
    basis,
    disc,
    one_thread,  # noqa: F401
    window_for,
)
from trainers.data import Case
from trainers.evaluate import dice_per_label, evaluate, summarize
from trainers.split import is_held_out
from trainers.unet import UnetTrainer

LABELS = {"disc": 5}
QUICK = {"iterations": 30, "learning_rate": 0.005}

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, **kwargs):
    return UnetTrainer(basis(folder / "model", LABELS, **kwargs))


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    store = Folder(tmp_path_factory.mktemp("accepted"))
    for seed in range(10):
        store.add_disc(f"case_{seed:04d}", seed, value=5)
    return store


def test_dice_against_figures_worked_out_by_hand():
    truth = np.zeros((4, 4, 2), int)
    truth[:2, :2] = 5
    predicted = np.zeros_like(truth)
    predicted[1:3, :2] = 5
    predicted[3, 3, 0] = 9
    labels = {"disc": 5, "invented": 9, "nowhere": 11}
    found = dice_per_label(predicted, truth, labels)
    assert found["disc"] == pytest.approx(2 * 4 / (8 + 8))
    assert found["invented"] == 0.0 and math.isnan(found["nowhere"])
    missed = dice_per_label(np.zeros_like(truth), truth, labels)
    assert missed["disc"] == 0.0
    score = summarize({"a": found, "b": missed}, list(labels))
    assert score.per_label["disc"] == 0.25 and score.value == pytest.approx((0.25 + 0.0) / 2)
    assert math.isnan(score.per_label["nowhere"]) and score.record()["per_label"]["nowhere"] is None


def test_evaluation_is_at_the_images_own_resolution(tmp_path):
    class Bright(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(50.0))

        def forward(self, x):
            return self.scale * torch.cat([0.5 - x, x - 0.5], dim=1)

    store = Folder(tmp_path)
    image, mask = disc(1, width=90, height=70, radius=20, bright=220)
    store.add("a", image, mask * 5)
    entry = store.datalist()[0]
    case = Case(case_id="a", image=Path(entry["image"]), label=Path(entry["label"]))
    model = UnetModel(network=Bright().eval(), labels=LABELS, size=48)
    assert evaluate(model, [case], window_for=window_for).value > 0.95


@pytest.fixture(scope="module")
def rounds(accepted, tmp_path_factory):
    """Two rounds: one that learns, one that starts anew and hardly trains."""
    folder = tmp_path_factory.mktemp("rounds")
    task = trainer(folder)
    first = task({**QUICK, "seed": 1}, accepted)
    served = task.path.read_bytes()
    second = task({"iterations": 1, "warm_start": False}, accepted)
    return task, first, served, second


def test_a_round_learns_publishes_and_tells_the_viewers(rounds, accepted):
    task, first, _, _ = rounds
    assert first["published"] and first["candidate_dice"] > 0.7 and first["champion_dice"] is None
    held = [f"case_{i:04d}" for i in range(10) if is_held_out(f"case_{i:04d}", fraction=0.25)]
    assert first["held_out"] == len(held) and first["training_cases"] == 10 - len(held)
    assert first["best_metric"] == first["candidate_dice"] == first["per_label"]["disc"]
    assert first["epoch"] == first["total_epochs"] and first["total_time"].count(":") == 2
    line = task.publisher.rounds()[0]
    assert line["held_out_ids"] == held and not set(held) & set(line["training_ids"]) and line["seed"] == 1


def test_a_worse_round_leaves_the_served_weights(rounds):
    task, first, served, second = rounds
    assert not second["published"] and "not better" in second["reason"]
    assert task.path.read_bytes() == served
    assert second["champion_dice"] == first["candidate_dice"] == second["best_metric"]
    assert [line["decision"] for line in task.publisher.rounds()] == ["published", "refused"]
    assert (second["round"], second["epoch"], second["total_epochs"]) == (2, 1, 1)
    assert not (task.basis.model_dir / "unet-candidate.safetensors").exists()


def test_a_second_training_at_the_same_time_is_refused(rounds, accepted):
    task, _, _, _ = rounds
    found = []

    def second():
        with pytest.raises(InputError, match="a training is running") as error:
            task({**QUICK}, accepted)
        found.append(error.value.status)

    with task.rounds.one():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert found == [409] and len(task.publisher.rounds()) == 2


def test_a_running_round_is_told_over_the_last_outcome(rounds):
    task, _, _, second = rounds
    with task.rounds.one():
        task.rounds.tell({"running": 3, "epoch": 4, "total_epochs": 20})
        during = task.stats()
    assert during == {k: v for k, v in {**second, **during}.items() if k != "total_time"}
    assert (during["running"], during["epoch"], during["round"]) == (3, 4, 2) and during["champion_dice"]
    assert task.stats() == second


def test_a_killed_training_leaves_the_last_outcome(rounds):
    task, _, _, second = rounds
    code = (
        "import sys, time, pathlib, trainers.rounds\n"
        "rounds = trainers.rounds.Rounds(pathlib.Path(sys.argv[1]), 'unet')\n"
        "with rounds.one():\n"
        "    rounds.tell({'running': 3, 'epoch': 1, 'total_epochs': 20})\n"
        "    print('told', flush=True)\n"
        "    time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, str(task.basis.model_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout.readline() == b"told\n"
        assert task.stats()["running"] == 3
        process.kill()
    assert task.rounds.progress_path.exists()
    assert task.stats() == second
    assert not task.rounds.progress_path.exists()


def test_a_failed_training_leaves_the_last_outcome(rounds, accepted, monkeypatch):
    task, _, _, second = rounds

    def fail(*args, **kwargs):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr("trainers.round.train", fail)
    with pytest.raises(FloatingPointError):
        task({**QUICK}, accepted)
    assert task.stats() == second


def test_statistics_are_read_once_per_change(rounds, monkeypatch):
    task, _, _, second = rounds
    assert task.stats() == second
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("read again"))
    assert task.stats() == second


def test_warm_start_begins_where_the_served_model_is(rounds, accepted, tmp_path):
    _, first, served, _ = rounds
    again = trainer(tmp_path)
    again.path.parent.mkdir()
    again.path.write_bytes(served)
    result = again({"iterations": 1, "learning_rate": 1e-7}, accepted)
    assert result["warm_start"]
    assert result["candidate_dice"] == pytest.approx(first["candidate_dice"], abs=0.01)


def test_other_labels_start_from_scratch_and_replace(rounds, accepted, tmp_path):
    _, _, served, _ = rounds
    other = UnetTrainer(basis(tmp_path, {"ball": 5}, iterations=15))
    other.path.write_bytes(served)
    result = other({"learning_rate": 0.005}, accepted)
    assert result["champion_dice"] is None and not result["warm_start"] and result["published"]
    assert dict(load_unet(other.path).labels) == {"ball": 5}


def test_too_few_labels_tell_what_is_missing_and_what_to_accept(tmp_path):
    store = Folder(tmp_path)
    store.add_disc("case_0001", 0)
    for seed in (0, 2, 3):
        store.add_disc(f"case_{seed:04d}", seed, accepted=False)
    task = trainer(tmp_path)
    for call in (lambda: task.precheck(store), lambda: task({}, store)):
        with pytest.raises(InputError) as error:
            call()
        text = str(error.value)
        assert error.value.status == 409
        assert "accepted cases = 1: 1 of them for training and 0 held out" in text
        assert "at least 3 cases for training (for instance case_0002)" in text
        assert "at least 1 held-out case (for instance case_0000, case_0003)" in text
    assert not task.path.exists() and task.stats() == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0),
        ("iterations", "abc"),
        ("max_minutes", None),
        ("learning_rate", "fast"),
        ("learning_rate", -3),
        ("batch_size", 0),
        ("batch_size", [8, 16]),
        ("seed", 1.5),
        ("device", "cuda:7"),
        ("device", ["tpu", "cpu"]),
        ("warm_start", 3),
    ],
)
def test_bad_settings_are_named(accepted, tmp_path, name, value):
    task = trainer(tmp_path)
    for call in (lambda: task.check({name: value}), lambda: task({name: value}, accepted)):
        with pytest.raises(InputError, match=f"^{name} = ") as error:
            call()
        assert error.value.status == 400


def test_what_viewers_send_is_accepted(tmp_path):
    task = trainer(tmp_path)
    task.check({})
    task.check(task.config())
    sent = {"iterations": "30", "learning_rate": "0.01", "device": "cpu", "warm_start": "False"}
    task.check({**sent, "model": "unet", "client_id": "user", "max_epochs": 50, "gpus": "all"})


def test_the_weights_record_their_window(accepted, tmp_path):
    window = load_project().window
    assert window == {"ct": {"level": 40.0, "width": 400.0}, "other": None}
    task = trainer(tmp_path, window=window)
    task({**QUICK}, accepted)
    assert load_unet(task.path).window == window


def test_config_lists_the_cpu_and_holds_plain_values(tmp_path):
    config = trainer(tmp_path).config()
    assert "cpu" in config["device"] and (torch.cuda.is_available() or config["device"] == ["cpu"])
    assert all(isinstance(v, int | float | bool | str | list) for v in config.values())


@pytest.mark.slow
@pytest.mark.real_data
def test_thirty_radiographs_teach_what_a_lung_is(real_set, tmp_path):
    folder = real_set("cxr_lung_v7")
    store = Folder(tmp_path)
    for path in sorted((folder / "images").iterdir())[:40]:
        for part in ("images", "labels"):
            (store.root / part / path.name).symlink_to(folder / part / path.name)
    task = UnetTrainer(basis(tmp_path / "model", {"lungs": 1}, size=128))
    result = task({"iterations": 150}, store)
    assert result["published"] and result["candidate_dice"] > 0.8
