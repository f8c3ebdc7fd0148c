"""The table of rated candidates: who looks at the truth, what noise and thresholds are, and rows that run."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.papers import command
from bench.papers.aligning import Feedback, align, ask
from bench.papers.coarse import careless_box, found_box, network_boxes, whole_box
from bench.papers.feedback import ANNOTATORS, INFORMED, directions, with_noise
from bench.papers.konwer import numbers, one_label
from bench.papers.konwerrows import BASE, ROWS
from bench.papers.learners import Recipe
from bench.papers.policy import GRID, Stages, Start, as_logit, best_threshold
from bench.papers.sets import Sample, read_set
from bench.papers.split import draw_labelled, split_set
from bench.papers.study import Study
from sam_infer.candidates import CandidateSet, by_thresholds
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.geometry import tight_box
from tests.conftest import disc, save_png
from tests.sam_data import quick_base

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 48
STAGES = Stages(first=3, second=2, batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of 14 images of a bright disc each; two of them hold another object and no disc."""
    root = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / part).mkdir()
    for number in range(14):
        inside = disc((SIDE, SIDE), rng.uniform(18, 30, 2), rng.uniform(8, 13))
        grey = np.where(inside, 180, 50) + rng.normal(0, 10, inside.shape)
        save_png(root / "images" / f"case_{number:02d}.png", np.clip(grey, 0, 255).astype(np.uint8))
        save_png(root / "labels" / f"case_{number:02d}.png", (inside * (1 + (number < 2))).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def engine():
    """A SAM of segment-anything's classes, so small that a step takes some milliseconds."""
    return quick_base()


@pytest.fixture(scope="module")
def start(folder, engine, tmp_path_factory):
    data = read_set(folder)
    data, split = one_label(data, split_set(data), "1")
    study = Study(
        data=data,
        split=split,
        recipe=Recipe(size=32, iterations=3, batch=2),
        encoder=SliceEncoder(engine=engine),
        out=tmp_path_factory.mktemp("out"),
        tell=lambda text: None,
    )
    return Start(study, STAGES, labelled=3, boxes="careless", seed=0)


def forbidden():
    raise AssertionError("the truth was looked at")


def candidates():
    """A disc at four thresholds, from loose to strict."""
    j, i = np.mgrid[:32, :32]
    hill = np.clip(1 - np.hypot(i - 16, j - 16) / 20, 0, 1).astype(np.float32)
    return by_thresholds(hill)


def test_who_looks_at_the_truth():
    rng = np.random.default_rng(0)
    predicted = replace(candidates(), thresholds=(), predicted_iou=(0.1, 0.9, 0.5, 0.2))
    for name, annotator in ANNOTATORS.items():
        if name in INFORMED:
            with pytest.raises(AssertionError, match="was looked at"):
                annotator(predicted, forbidden, rng)
            scores = annotator(predicted, lambda: predicted.masks[2], rng)
            assert scores.argmax() == 2
        else:
            assert len(set(annotator(predicted, forbidden, rng))) == 4
    assert list(ANNOTATORS["prediction"](predicted, forbidden, rng)) == [0.1, 0.9, 0.5, 0.2]
    orders = {tuple(ANNOTATORS["chance"](predicted, forbidden, rng)) for _ in range(200)}
    assert len(orders) == 24
    assert Feedback(annotator="rating").informed and not Feedback(annotator="prediction").informed


def test_rows_that_say_so_never_read_the_truth_of_what_they_learn_from(start):
    def blind(sample):
        """The sample with a truth that is somewhere else."""
        return replace(sample, truth=np.roll(sample.truth, 20, axis=1))

    start.boxes  # noqa: B018 - made from the truth, once
    first, samples = start.first(), start.pool[:3]
    for feedback in (
        Feedback(source="masks", annotator="prediction"),
        Feedback(annotator="chance"),
        Feedback(),
    ):
        given, moved = (ask(start, first, some, feedback) for some in (samples, [blind(s) for s in samples]))
        same = all(
            torch.equal(a.c, b.c) and torch.equal(a.reference, b.reference)
            for a, b in zip(given.rated, moved.rated, strict=True)
        )
        assert same != feedback.informed
        assert not any(one.view.truth.any() for one in given.rated)


def test_noise_takes_neighbours_for_each_other():
    scores = np.random.default_rng(0).random((40, 4))
    assert np.array_equal(with_noise(scores, 0.0, np.random.default_rng(1)), scores)
    noisy = with_noise(scores, 0.3, np.random.default_rng(1))
    assert np.array_equal(np.sort(noisy, 1), np.sort(scores, 1))
    changed = (noisy != scores).any(1)
    assert changed.sum() == 12
    ranks = [np.argsort(np.argsort(-s[changed], 1), 1) for s in (noisy, scores)]
    assert (np.abs(ranks[0] - ranks[1]).max(1) == 1).all()
    assert ((ranks[0] != ranks[1]).sum(1) == 2).all()


def test_noise_of_ratings_swaps_levels_and_leaves_ties_tied():
    ratings = np.array([[4.0, 4.0, 3.0, 1.0]] * 8)
    noisy = with_noise(ratings, 1.0, np.random.default_rng(1), levels=True)
    assert {tuple(row) for row in noisy} == {(3, 3, 4, 1), (4, 4, 1, 3)}
    assert np.array_equal(with_noise(ratings, 0.0, np.random.default_rng(1), levels=True), ratings)


def test_no_noise_is_the_ranking_itself(start):
    first, samples = start.first(), start.pool[:3]
    plain, none, all_of = (
        align(start, first, samples, Feedback(noise=share))[0].learner.learned() for share in (0.0, 1e-9, 1.0)
    )
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    assert any(not torch.equal(plain[name], all_of[name]) for name in plain)


def test_where_preferences_point():
    one = candidates()
    scores = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [1, 4, 2, 3], [1, 1, 1, 1]], float)
    assert directions([one] * 4, scores) == {"loosest": 0.25, "strictest": 0.25}
    same = CandidateSet(masks=np.repeat(one.masks[:1], 4, 0), source="masks")
    assert directions([same], scores[:1]) == {"loosest": 0.0, "strictest": 0.0}


def test_stage_2_moves_the_mask_decoder_alone_and_towards_what_is_preferred(start):
    first = start.first()
    aligned, figures = align(start, first, start.pool[:4], Feedback())
    before, after = first.learner.learned(), aligned.learner.learned()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("sam.mask_decoder.") for name in moved)
    assert 0 < figures["band"] <= 1 and figures["margin"] > 0
    longer = replace(STAGES, second=20, second_rate=1e-3)
    further = Start(start.study, longer, labelled=3, boxes="careless", seed=0)
    asked = ask(further, first, start.pool[:4], Feedback())
    policy, _ = align(further, first, start.pool[:4], Feedback())
    again = ask(further, policy, start.pool[:4], Feedback())
    for old, new in zip(asked.rated, again.rated, strict=True):
        assert not old.c.any() or float((old.c * (new.reference - old.reference)).sum()) > 0


def test_the_threshold_is_the_best_of_the_labelled_images():
    truth = disc((40, 40), (20, 20), 10)
    j, i = np.mgrid[:40, :40]
    distance = np.hypot(i - 20, j - 20)
    sample = Sample(name="a", group="a", image=None, truth=truth.astype(np.uint8), digest="a")
    for wanted in (0.2, 0.5, 0.75):
        logits = (as_logit(wanted) + 10.0 - distance).astype(np.float32)
        assert best_threshold({"a": logits}, [sample]) == pytest.approx(wanted, abs=0.05)
        assert np.array_equal(logits > as_logit(wanted), truth & (distance < 10))
    clear = np.where(truth, 9.0, -9.0).astype(np.float32)
    assert best_threshold({"a": clear}, [sample]) == 0.5  # of equals, what is published
    assert len(GRID) == 17


def test_boxes_are_off_by_no_more_than_is_said_and_fixed_by_the_name(start):
    for sample in start.study.split.train:
        box, true = careless_box(sample), tight_box(sample.truth > 0)
        assert box == careless_box(sample) == start.given(sample).box
        sides = np.array([true[2] - true[0] + 1, true[3] - true[1] + 1] * 2)
        assert (np.abs(np.subtract(box, true)) <= 0.25 * sides + 1e-9).all()
    sample = start.study.split.train[0]
    assert start.given(sample, "whole").box == whole_box(sample) == (0, 0, SIDE - 1, SIDE - 1)
    assert start.given(sample, "whole+text").text.shape == (512,)
    assert found_box(np.zeros((SIDE, SIDE), bool), sample) == whole_box(sample)


def test_boxes_of_a_network_come_from_one_that_did_not_learn_from_the_image(start, monkeypatch):
    seen = []

    class Learned:
        seconds = 0.0

        def __init__(self, names):
            self.names = names

    def learn(samples, *_, **__):
        seen.append({s.name for s in samples})
        return Learned(seen[-1])

    def labels(learned, sample, keep):
        assert sample.name not in learned.names
        return sample.truth

    monkeypatch.setattr("bench.papers.coarse.learn", learn)
    monkeypatch.setattr("bench.papers.coarse.clean_labels", labels)
    monkeypatch.setattr(Study, "learned", lambda self, name, n, seed, make: make())
    boxes = network_boxes(start.study, start.draw, 0)
    assert len(seen) == 4
    assert set(boxes) == {s.name for s in (*start.study.split.train, *start.study.split.test)}
    few = draw_labelled(start.study.split, 1, 0)
    with pytest.raises(InputError, match="two labelled images"):
        network_boxes(start.study, few, 0)


def test_one_label_and_how_many_images(folder):
    data = read_set(folder)
    split = split_set(data)
    with pytest.raises(InputError, match="choose one of 1, 2"):
        one_label(data, split, None)
    with pytest.raises(InputError, match="choose one of 1, 2"):
        one_label(data, split, "liver")
    only, kept = one_label(data, split, "1")
    assert only.labels == {"1": 1}
    assert all(sample.present == {1} for sample in (*kept.train, *kept.test))
    assert len(only.samples) == len(kept.train) + len(kept.test) == 12
    assert numbers(86, None) == (9, [9, 17, 34])
    assert numbers(86, [80]) == (80, [6])
    with pytest.raises(InputError, match="label 1 to 85"):
        numbers(86, [86])


def arguments(folder, out, *more):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    common = ["papers", "konwer", "--data", str(folder), "--out", str(out), "--quick", "--label", "1"]
    return parser.parse_args([*common, *more])


def test_every_row_runs_and_is_not_run_again(folder, tmp_path, engine, monkeypatch, capsys):
    monkeypatch.setattr(command, "create_engine", lambda *_, **__: engine)
    monkeypatch.setattr("bench.papers.konwer._QUICK", Stages(first=1, second=1, batch=2))
    monkeypatch.setattr("bench.papers.konwer.SHARES", (0.3,))
    args = arguments(folder, tmp_path)
    assert command.run(args) == 0
    printed = capsys.readouterr().out
    lines = json.loads((tmp_path / "konwer.json").read_text())["lines"]
    assert {line["row"] for line in lines} == {row.name for row in ROWS}
    assert (tmp_path / "konwer.md").read_text() in printed
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("konwer.png", "konwer_curves.png"))
    by_row = {line["row"]: line for line in lines}
    for row in ROWS:
        line = by_row[row.name]
        assert 0 <= line["iou"] <= line["test_dice"] <= 1
        assert (line["difference"] is None) == (row.name == BASE)
        assert (line["n"] == 0) == row.once
    for name in ("predicted", "random", "supervised", BASE, "threshold"):
        assert by_row[name]["rated"] == 0, name
    for name in ("best", "rating", "ranking", "noise30", "masks", "ranking-threshold"):
        assert by_row[name]["rated"] == by_row[name]["n"] > 0, name
    assert by_row["supervised"]["drawn"] == by_row["ranking"]["drawn"] + by_row["supervised"]["n"]
    monkeypatch.setattr("bench.papers.aligning.train", None)
    monkeypatch.setattr("bench.papers.policy.train", None)
    monkeypatch.setattr(SamEngine, "decode", None)
    assert command.run(args) == 0
    assert "seed 0" not in capsys.readouterr().out
    # Other boxes and other numbers of labelled images are other rows, although all names are the same.
    for more in (("--labelled", "2"), ("--prompts", "unet", "--iterations", "1")):
        with pytest.raises(TypeError, match="not callable"):
            command.run(arguments(folder, tmp_path, *more))


def test_stage_1_is_kept_and_read_back(start, monkeypatch):
    first = start.first("box+text")
    monkeypatch.setattr("bench.papers.policy.train", None)
    fresh = Start(start.study, STAGES, labelled=3, boxes="careless", seed=0).first("box+text")
    found, wanted = fresh.learner.learned(), first.learner.learned()
    assert found.keys() == wanted.keys() and any(name.startswith("extras.") for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert fresh.seconds == first.seconds


def test_only_a_sam_can_be_tuned(folder, tmp_path, capsys):
    assert command.run(arguments(folder, tmp_path, "--engine", "bundled")) == 2
    assert "this paper tunes a SAM" in capsys.readouterr().err
