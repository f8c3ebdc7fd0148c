"""The papers' tables: nothing of the test part is learned from, figures are right, and every row runs."""

import argparse
import csv
import json

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance

from bench.papers import command, hakkinen, keuth
from bench.papers.annotated import noisy
from bench.papers.learners import Recipe
from bench.papers.nnunet import check_installed, write_dataset
from bench.papers.records import Outcome
from bench.papers.sets import Sample, read_set, sides_of
from bench.papers.split import Draw, Split, check_apart, draw_labelled, split_set
from bench.papers.statistics import hausdorff95, judge, mean_dice, paired_interval
from bench.papers.study import Study
from bench.papers.walker import Walk, seeds_of, walked
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError
from tests.conftest import disc, save_png
from tests.fakes import ThresholdEngine
from trainers.evaluate import dice_per_label

SIDE = 72
ONE, TWO = {"a": 1}, {"a": 1, "b": 2}


def shapes(rng):
    """A disc, a square and an ellipse, each of its own grey, at places of its own; (image, labels)."""
    labels = np.zeros((SIDE, SIDE), np.uint8)
    x, y = rng.uniform(12, 24, 2)
    labels[disc((SIDE, SIDE), (x, y), rng.uniform(7, 10))] = 1
    x, y, side = *rng.integers(40, 48, 2), rng.integers(13, 18)
    labels[y : y + side, x : x + side] = 2
    if rng.random() < 0.7:
        j, i = np.mgrid[:SIDE, :SIDE]
        labels[((i - 54) / 12) ** 2 + ((j - rng.uniform(14, 22)) / 6) ** 2 <= 1] = 3
    grey = np.array([40, 150, 190, 230])[labels] + rng.normal(0, 8, labels.shape)
    return np.clip(grey, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of 16 images of 8 patients."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    rows = []
    for part in ("images", "labels"):
        (root / part).mkdir()
    for number in range(16):
        name = f"case_{number:02d}"
        for part, pixels in zip(("images", "labels"), shapes(rng), strict=True):
            save_png(root / part / f"{name}.png", pixels)
        rows.append({"stem": name, "patientid": str(number // 2)})
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["stem", "patientid"])
        writer.writeheader()
        writer.writerows(rows)
    return root


def samples_of(*truths):
    """Samples without a file behind them."""
    return [
        Sample(name=f"s{n}", group=f"s{n}", image=None, truth=t, digest=str(n)) for n, t in enumerate(truths)
    ]


def arguments(paper, folder, out, *more):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["papers", paper, "--data", str(folder), "--out", str(out), "--quick", *more])


def test_nothing_of_the_test_part_is_ever_learned_from(folder):
    split = split_set(read_set(folder))
    assert len(split.test) == 4
    tested = {s.name for s in split.test}
    for seed in range(5):
        for n in (1, 3, 11):
            draw = draw_labelled(split, n, seed)
            assert len(draw.labelled) == n
            assert not tested & {s.name for s in (*draw.labelled, *draw.pool)}
            assert {s.name for s in (*draw.labelled, *draw.pool, *split.test)} == {
                f"case_{i:02d}" for i in range(16)
            }
            assert not {s.group for s in split.test} & {s.group for s in (*draw.labelled, *draw.pool)}
    assert split_set(read_set(folder)).test[0].name == split.test[0].name
    leaked = Draw(labelled=split.train[:1], pool=(*split.train[1:], split.test[0]))
    with pytest.raises(AssertionError, match="of the test part is also outside it"):
        check_apart(split, leaked)
    copied = vars(split.test[0]) | {"name": "copy", "group": "copy"}
    with pytest.raises(AssertionError, match="digest"):
        check_apart(split, Draw(labelled=split.train[:1], pool=(Sample(**copied),)))
    with pytest.raises(InputError, match="draw 1 to 11 of the images"):
        draw_labelled(split, 12, 0)


def test_draws_hold_every_label_and_are_nested():
    truths = [np.full((2, 2), 1, np.uint8)] * 8 + [np.full((2, 2), v, np.uint8) for v in (2, 3)]
    split = Split(train=tuple(samples_of(*truths)), test=())
    for seed in range(10):
        small, large = (draw_labelled(split, n, seed).labelled for n in (3, 6))
        assert set().union(*(s.present for s in small)) == {1, 2, 3}
        assert {s.name for s in small} <= {s.name for s in large}
    assert {tuple(s.name for s in draw_labelled(split, 6, seed).labelled) for seed in range(5)} != 1


def test_figures_agree_with_the_reference(one_thread):
    rng = np.random.default_rng(1)
    for _ in range(5):
        prediction, truth = (shapes(rng)[1] for _ in range(2))
        labels = {"disc": 1, "square": 2, "ellipse": 3, "none": 9}
        found = judge(prediction, truth, labels)
        wanted = dice_per_label(prediction[..., None], truth[..., None], labels)
        for name, value in labels.items():
            if (truth == value).any():
                assert found["dice"][name] == pytest.approx(wanted[name])
            else:
                assert name not in found["dice"]
                assert (name in found["false"]) == (wanted[name] == 0)
        a, b = (torch.from_numpy(m == 1)[None, None] for m in (prediction, truth))
        theirs = compute_hausdorff_distance(a, b, include_background=True, percentile=95)
        assert found["hd95"]["disc"] == pytest.approx(float(theirs))
    square = np.zeros((9, 12), bool)
    square[2:5, 2:5] = True
    assert hausdorff95(square, np.roll(square, 4, axis=1)) == 4


def test_what_is_invented_counts_only_where_it_is_strict():
    truth, prediction = np.zeros((2, 4, 4), np.uint8)
    truth[0] = 1
    prediction[0], prediction[3] = 1, 2
    images = {"x": judge(prediction, truth, TWO)}
    assert mean_dice(images) == 1.0
    assert mean_dice(images, strict=True) == 0.5


def test_intervals_pair_images_and_keep_seeds_together():
    rng = np.random.default_rng(2)
    base = [
        {f"i{n}": {"dice": {"a": v}, "false": []} for n, v in enumerate(rng.random(20))} for _ in range(3)
    ]
    better = [{n: {"dice": {"a": j["dice"]["a"] + 0.1}, "false": []} for n, j in one.items()} for one in base]
    assert paired_interval(better, base) == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = paired_interval(base[:1] * 3, base[1:2] * 3)
    assert low < 0 < high and low < mean < high
    # The same seed three times over tells no more than once.
    assert paired_interval(base[:1], base[1:2]) == pytest.approx((mean, low, high))


def test_the_walk_leaves_a_band_and_finds_the_edge():
    truth = disc((64, 64), (32, 32), 14).astype(np.uint8)
    worse = np.roll(truth, 3, axis=1)
    walk = Walk(inner=4, outer=6)
    seeds = seeds_of(worse, walk)
    assert set(np.unique(seeds)) == {0, 1, 255}
    assert 600 < (seeds == 0).sum() < 1200
    image = (0.3 + 0.4 * truth).astype(np.float32)
    before, after = (judge(mask, truth, ONE)["dice"]["a"] for mask in (worse, walked(image, worse, walk)))
    assert before < 0.9 and after > 0.97
    assert np.array_equal(walked(image, np.zeros_like(truth)), np.zeros_like(truth))


def test_noise_is_as_wrong_as_was_asked():
    truth = shapes(np.random.default_rng(3))[1]
    sample = samples_of(truth)[0]
    labels = {str(v): int(v) for v in np.unique(truth) if v}
    judged = {"dice": dict.fromkeys(labels, 0.8)}
    kinds = set()
    for seed in range(6):
        found = noisy(sample, judged, labels, seed=seed)
        dice = judge(found, truth, labels)["dice"]
        assert list(dice.values()) == pytest.approx([0.8] * len(labels), abs=0.01)
        kinds |= {bool((found == v).sum() > (truth == v).sum()) for v in labels.values()}
    assert kinds == {True, False}
    assert not noisy(sample, {"dice": dict.fromkeys(labels, 0.0)}, labels, seed=0).any()


def test_a_row_is_made_once_for_what_it_follows_from(folder, tmp_path):
    data = read_set(folder)
    made = []

    def study(iterations):
        return Study(
            data=data,
            split=split_set(data),
            recipe=Recipe(size=32, iterations=iterations, batch=2),
            encoder=SliceEncoder(engine=create_engine("bundled")),
            out=tmp_path,
            tell=made.append,
        )

    def make():
        image = study(1).split.test[0]
        test = study(1).judged({image.name: image.truth}, (image,), distance=True)
        maps = {image.name: image.truth}
        return Outcome(row="r", n=3, seed=0, test=test, seconds=1.0, drawn=3, trained=3, predictions=maps)

    first, second = (study(1).outcome("r", 3, 0, make) for _ in range(2))
    assert len(made) == 1
    assert first.test == second.test
    assert np.array_equal(*(next(iter(one.predictions.values())) for one in (first, second)))
    for again in (study(2).outcome("r", 3, 0, make), study(1).outcome("r", 3, 1, make)):
        assert again.row == "r"
    assert len(made) == 3


def test_every_row_of_both_papers_runs_and_is_not_run_again(
    folder, tmp_path, monkeypatch, one_thread, capsys
):
    monkeypatch.setattr(command, "create_engine", lambda *_, **__: ThresholdEngine())
    for paper, rows in (("keuth", keuth.ROWS), ("hakkinen", hakkinen.ROWS)):
        names = ",".join(row.name for row in rows if not row.optional)
        args = arguments(paper, folder, tmp_path, "--rows", names, "--iterations", "8")
        assert command.run(args) == 0
        printed = capsys.readouterr().out
        record = json.loads((tmp_path / f"{paper}.json").read_text())
        assert {line["row"] for line in record["lines"]} == set(names.split(","))
        assert (tmp_path / f"{paper}.md").read_text() in printed
        assert (tmp_path / f"{paper}.png").stat().st_size > 10_000
        for line in record["lines"]:
            assert 0 <= line["test_dice"] <= 1
            compared = line["row"] not in (keuth.BASE, hakkinen.BASE, "all")
            assert (line["difference"] is not None) == compared
    box = next(s for s in record["strategies"] if s["strategy"] == "box_class")
    assert box["clicks_per_object"] == 2
    monkeypatch.setattr("bench.papers.learners.train", None)
    monkeypatch.setattr(SliceEncoder, "decode", None)
    assert command.run(args) == 0
    assert "seed 0" not in capsys.readouterr().out


def test_rows_that_are_not_known_are_refused(folder, tmp_path, capsys):
    assert command.run(arguments("keuth", folder, tmp_path, "--rows", "unet,magic")) == 2
    assert "magic" in capsys.readouterr().err
    assert command.run(arguments("keuth", tmp_path / "nowhere", tmp_path)) == 2
    assert "name a folder that holds images/ and labels/" in capsys.readouterr().err


def test_nnunet_needs_its_package(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pip install nnunetv2"):
        check_installed()
    assert command.run(arguments("keuth", folder, tmp_path, "--nnunet")) == 2
    data = read_set(folder)
    split = split_set(data)
    write_dataset(split.train[:2], split.test[:1], labels={"a": 1, "c": 3}, size=64, folder=tmp_path / "d")
    files = sorted(str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").rglob("*.*"))
    names = [s.name for s in split.train[:2]]
    wanted = [f"imagesTr/{n}_0000.png" for n in names] + [f"labelsTr/{n}.png" for n in names]
    assert files == sorted([*wanted, f"imagesTs/{split.test[0].name}_0000.png", "dataset.json"])
    assert json.loads((tmp_path / "d" / "dataset.json").read_text())["labels"] == {
        "background": 0,
        "a": 1,
        "c": 2,
    }


def test_organs_of_a_pair_become_two_labels():
    truth = np.zeros((6, 10), np.uint8)
    truth[1:3, 1:3], truth[3:5, 7:9], truth[5, 0] = 2, 2, 1
    found = sides_of(truth, 2, 4)
    assert np.array_equal(found == 2, (truth == 2) & (np.arange(10) < 5))
    assert np.array_equal(found == 4, (truth == 2) & (np.arange(10) >= 5))
    assert np.array_equal(found == 1, truth == 1)


@pytest.mark.real_data
@pytest.mark.slow
def test_quick_run_on_real_slices(real_set, tmp_path):
    data = real_set("ct_abdomen_curvas")
    assert command.run(arguments("keuth", data, tmp_path)) == 0
    lines = {line["row"]: line for line in json.loads((tmp_path / "keuth.json").read_text())["lines"]}
    # The engine is good at boxes of the truth; what the first network gives after 20 steps is not.
    assert lines["oracle"]["pseudo_dice"] > 0.7
