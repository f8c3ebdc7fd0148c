import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.samloop.project import load_project
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.networks.unet import UnetModel, build_unet, load_unet
from sam_infer.volumes import read_image
from tests.loop_data import (
    Folder,
    disc,
    one_thread,  # noqa: F401
    window_for,
)
from trainers.augment import Augmentation
from trainers.data import Case, Slices, SliceStore, choose_slices, sampling_weights
from trainers.evaluate import dice_per_label, evaluate, summarize
from trainers.loop import Settings, rate, supervised_step, train
from trainers.split import is_held_out
from trainers.unet import UnetTrainer

LABELS = {"disc": 5}
QUICK = {"iterations": 30, "learning_rate": 0.005}

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, **kwargs):
    return UnetTrainer(
        model_dir=folder / "model", labels=LABELS, window_for=window_for, size=48, threads=1, **kwargs
    )


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    store = Folder(tmp_path_factory.mktemp("accepted"))
    for seed in range(10):
        store.add_disc(f"case_{seed:04d}", seed, value=5)
    return store


def slices(count=6, size=48):
    pairs = [disc(seed, width=size, height=size) for seed in range(count)]
    return Slices(
        images=np.stack([p[0] for p in pairs]),
        labels=np.stack([p[1] for p in pairs]).astype(np.uint8),
        cases=np.arange(count),
    )


def run(seed, iterations=4, **kwargs):
    torch.manual_seed(0)
    step = supervised_step(slices(), classes=1, batch=2, augment=Augmentation())
    settings = Settings(iterations=iterations, epochs=2, seed=seed, **kwargs)
    return train(build_unet(labels=1), step, settings)


def weights(result):
    return torch.cat([t.flatten().float() for t in result.network.state_dict().values()])


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = run(1), run(1), run(2)
    assert torch.equal(weights(first), weights(again)) and first.losses == again.losses
    assert not torch.equal(weights(first), weights(other))


def test_the_average_differs_from_the_last_weights():
    assert not torch.equal(weights(run(1)), weights(run(1, ema=0.0)))


def test_run_stops_when_time_is_up():
    step = supervised_step(slices(), classes=1, batch=1)
    late = train(build_unet(labels=1), step, Settings(iterations=100000, max_seconds=0.3))
    assert 0 < late.iterations < 1000 and late.stopped == "time is up"


def test_schedule_rises_then_falls_and_a_lost_run_is_an_error():
    values = [rate(p / 100, warmup=0.1) for p in range(101)]
    assert max(values) == pytest.approx(1.0) and values[0] < 0.2 and values[-1] == pytest.approx(0.01)
    assert values[10:] == sorted(values[10:], reverse=True)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(build_unet(labels=1), lambda s: next(s.network.parameters()).sum() * math.nan, Settings())


def test_augmentation_moves_image_and_label_together_and_flips_only_when_asked():
    image, mask = disc(3, bright=250)
    images = torch.from_numpy(image)[None, None].float().repeat(16, 1, 1, 1) / 255
    labels = torch.from_numpy(mask)[None, None].float().repeat(16, 1, 1, 1)
    calm = {"gamma": 0.0, "contrast": 0.0, "brightness": 0.0, "noise": 0.0}
    moved, marked = Augmentation(**calm)(images, labels, torch.Generator().manual_seed(0))
    overlap = ((moved > 0.6) & (marked > 0)).sum() * 2 / ((moved > 0.6).sum() + (marked > 0).sum())
    assert overlap > 0.93 and not torch.equal(marked, labels) and set(marked.unique().tolist()) == {0.0, 1.0}
    still = {**calm, "rotation": 0.0, "scale": 0.0, "shift": 0.0, "bend": 0.0}
    same, _ = Augmentation(**still)(images, labels, torch.Generator().manual_seed(0))
    assert torch.allclose(same, images, atol=1e-5)
    flipping = Augmentation(**still, flip_horizontal=True)
    mirrored, _ = flipping(images, labels, torch.Generator().manual_seed(0))
    hits = [torch.allclose(m, images[0].flip(-1), atol=1e-5) for m in mirrored]
    assert 3 < sum(hits) < 13


def test_slices_with_labels_come_first_and_some_without_are_kept():
    filled = np.zeros(200, bool)
    filled[50:150] = True
    chosen = choose_slices(filled, limit=40, empty_share=0.25)
    assert len(chosen) == 40 and sum(filled[chosen]) == 30 and chosen == sorted(set(chosen))
    assert min(chosen) == 0 and max(chosen) == 199
    assert choose_slices(np.array([False]), limit=4, empty_share=0.25) == [0]
    assert choose_slices(np.array([True]), limit=4, empty_share=0.25) == [0]


def test_rare_labels_and_small_cases_are_drawn_as_often_as_others():
    labels = np.zeros((10, 4, 4), np.uint8)
    labels[:9, 0, 0] = 1
    labels[0, 1, 1] = 2
    cases = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    drawn = sampling_weights(Slices(images=labels, labels=labels, cases=cases), classes=2)
    assert drawn.sum() == pytest.approx(1)
    assert drawn[8] == pytest.approx(8 * drawn[1])
    assert drawn[0] == pytest.approx(1 / 3 + drawn[1]) and drawn[9] == pytest.approx(1 / 3)


def test_prepared_slices_are_reused_and_a_changed_label_never_meets_an_old_entry(tmp_path):
    store = Folder(tmp_path)
    store.add_disc("a", 0, value=5, width=60, height=40)
    reads = []

    def read(path):
        reads.append(path)
        return read_image(path)

    prepared = SliceStore(folder=tmp_path / "cache", labels=LABELS, size=48, window_for=window_for, read=read)
    paths = store.datalist()[0]
    case = Case(case_id="a", image=Path(paths["image"]), label=Path(paths["label"]))
    first = prepared.load(case)
    assert first.images.shape == (1, 48, 48) and set(np.unique(first.labels)) == {0, 1}
    assert first.labels[0, 32:].max() == 0, "rows below a 60 x 40 slice are padding"
    prepared.load(case)
    assert len(reads) == 1
    other = Window(level=100, width=50)
    narrow = SliceStore(
        folder=tmp_path / "cache", labels=LABELS, size=48, window_for=lambda image, request: other, read=read
    )
    assert narrow.load(case).images.max() == 255 and len(reads) == 2
    store.add("a", disc(0, width=60, height=40)[0], np.zeros((40, 60)))
    os.utime(case.label, ns=(1, 1))
    assert prepared.load(case).labels.max() == 0


def test_prepared_slices_stay_under_the_limit_of_the_disk(tmp_path):
    store = Folder(tmp_path)
    for seed in range(5):
        store.add_disc(f"c{seed}", seed, value=5)
    prepared = SliceStore(
        folder=tmp_path / "cache", labels=LABELS, size=48, window_for=window_for, disk_limit=12_000
    )
    cases = [
        Case(case_id=str(i), image=Path(e["image"]), label=Path(e["label"]))
        for i, e in enumerate(store.datalist())
    ]
    assert len(prepared.load_all(cases)) == 5
    assert sum(f.stat().st_size for f in (tmp_path / "cache").iterdir()) <= 12_000


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
    assert score.per_label["disc"] == 0.25 and score.dice == pytest.approx((0.25 + 0.0) / 2)
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
    assert evaluate(model, [case], window_for=window_for).dice > 0.95


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
    assert not (task.model_dir / "unet-candidate.safetensors").exists()


def test_a_second_training_at_the_same_time_is_refused(rounds, accepted):
    task, _, _, _ = rounds
    found = []

    def second():
        with pytest.raises(InputError, match="a training of unet is running") as error:
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
    argv = [sys.executable, "-c", code, str(task.model_dir)]
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

    monkeypatch.setattr("trainers.unet.train", fail)
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
    other = UnetTrainer(
        model_dir=tmp_path, labels={"ball": 5}, window_for=window_for, size=48, threads=1, iterations=15
    )
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
    task = UnetTrainer(model_dir=tmp_path / "model", labels={"lungs": 1}, window_for=window_for, threads=1)
    result = task({"iterations": 150}, store)
    assert result["published"] and result["candidate_dice"] > 0.8
