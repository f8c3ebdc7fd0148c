"""The tables of SAM-Mix: boxes come from the classifier alone, oracles are apart, every row runs once."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.papers import command, sammix
from bench.papers.camlooks import Look, look, quality, recognised, true_box
from bench.papers.promptedsams import bare_answer, bare_masks
from bench.papers.sammixcells import Cell, Mix, Turn, draw_positive
from bench.papers.sammixrows import BASE, ORACLES, ROWS
from bench.papers.sets import read_set, turned
from bench.papers.split import split_set
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.networks.classifier import ClassifierModel, build_classifier
from sam_infer.tuning.tunedfile import untuned
from sam_infer.types import Prompts
from tests.conftest import disc, save_png
from tests.sam_data import quick_base
from trainers.mixsteps import central_prompts
from trainers.samviews import frame_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 64


def draw_set(root, *, count, seed):
    """A set of bright discs, label 1, on all but every fourth image; label 2 is everywhere."""
    rng = np.random.default_rng(seed)
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number in range(count):
        inside = disc((SIDE, SIDE), rng.uniform(22, 42, 2), rng.uniform(9, 14)) & (number % 4 != 1)
        grey = np.where(inside, 190, 50) + rng.normal(0, 10, inside.shape)
        labels = inside.astype(np.uint8)
        labels[:4, :4] = 2
        save_png(root / "images" / f"case_{number:02d}.png", np.clip(grey, 0, 255).astype(np.uint8))
        save_png(root / "labels" / f"case_{number:02d}.png", labels)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_set(tmp_path_factory.mktemp("near"), count=12, seed=0)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    return draw_set(tmp_path_factory.mktemp("far"), count=4, seed=1)


@pytest.fixture(scope="module")
def engine():
    """A SAM of segment-anything's classes, so small that a step takes some milliseconds."""
    return quick_base()


def arguments(folder, out, *more):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    given = ["papers", "sammix", "--data", str(folder), "--out", str(out), "--label", "1", "--quick", *more]
    return parser.parse_args(given)


def one_label(folder):
    data = read_set(folder)
    return sammix.of_label(data, split_set(data), "1")


def a_classifier():
    torch.manual_seed(1)
    network = build_classifier(labels=1, channels=(4, 4, 8, 8)).eval().requires_grad_(False)
    return ClassifierModel(network=network, labels={"1": 1}, channels=(4, 4, 8, 8))


def test_every_row_runs_with_oracles_apart_and_is_not_run_again(
    folder, shifted, engine, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "create_engine", lambda *_, **__: engine)
    args = arguments(folder, tmp_path, "--shifted", str(shifted), "--steps", "2", "--labelled", "3", "99")
    assert command.run(args) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "sammix.json").read_text())
    text = (tmp_path / "sammix.md").read_text()
    assert text in printed
    assert (tmp_path / "sammix.png").stat().st_size > 10_000
    assert (tmp_path / "sammix_curves.png").stat().st_size > 5_000

    lines, oracles = record["lines"], record["oracles"]
    assert {line["row"] for line in lines} == {row.name for row in ROWS}
    assert {line["row"] for line in oracles} == {row.name for row in ORACLES}
    before, after = text.split("With boxes of the truth:")
    for row in ORACLES:
        assert f"| {row.title} |" not in before and f"| {row.title} |" in after
    for row in ROWS:
        assert f"| {row.title} |" in before and f"| {row.title} |" not in after
    there = sum(bool(s.present) for s in one_label(folder)[1].train)
    assert {line["n"] for line in lines} == {0, 3, there}
    assert [line["n"] for line in lines if line["row"] in ("frozen", "lora")] == [0, there]
    for line in (*lines, *oracles):
        assert 0 <= line["test_dice"] <= 1 and 0 <= line["shifted_dice"] <= 1
        assert line["drawn"] == line["n"]
        assert (line["difference"] is None) == (line["row"] == BASE or line["n"] == 0)
    for line in lines:
        assert line["gated_false"] <= line["ungated_false"]
        cam = line["row"] not in (BASE, "bare")
        assert np.isfinite(line["box_iou"]) == cam
        assert np.isfinite(line["attention"]) == (line["row"] in ("attention", "lora"))
        assert line["image_labels"] == (9 if cam else 0)
        assert line["test_dice"] == pytest.approx(line["gated_dice" if cam else "ungated_dice"])
    assert [line["n"] for line in record["beside"]] == [3, there]

    for module in ("learners", "camlooks", "promptedsams"):
        monkeypatch.setattr(f"bench.papers.{module}.train", None)
    monkeypatch.setattr(SliceEncoder, "decode", None)
    assert command.run(args) == 0
    assert "seed 0" not in capsys.readouterr().out
    assert (tmp_path / "sammix.md").read_text() == text


def test_boxes_never_come_from_the_truth(folder):
    model = a_classifier()
    sample = next(s for s in one_label(folder)[1].test if s.present)
    for truth in (np.zeros_like(sample.truth), np.ones_like(sample.truth)):
        other = look(model, replace(sample, truth=truth), threshold=0.4)
        assert other.prompts is not None
        own = look(model, sample, threshold=0.4)
        assert other.prompts.box == own.prompts.box and other.present == own.present
        assert np.array_equal(other.prompts.attention, own.prompts.attention)
    assert own.prompts.box != true_box(sample)
    inside = np.argwhere(own.prompts.attention > 0)
    x0, y0, x1, y1 = own.prompts.box
    assert inside.min(0).tolist() == [y0, x0] and inside.max(0).tolist() == [y1, x1]
    assert own.activation[own.prompts.attention > 0].min() >= 0.4


def test_what_prompts_a_row_is_what_the_classifier_says(folder, engine, tmp_path, monkeypatch):
    """Every test prompt but the oracles' is one of the looks, whatever the truth."""
    data, split = one_label(folder)
    study = sammix_study(data, split, engine, tmp_path)
    turn = Turn(study, Mix(looks=1, schooling=sammix._QUICK.schooling), seed=0)
    box = (1.0, 2.0, 11.0, 12.0)
    given = Prompts(box=box, attention=np.ones((SIDE, SIDE), np.float32))
    found = Look(present=True, activation=np.ones((SIDE, SIDE), np.float32), prompts=given)
    monkeypatch.setattr(turn, "look", lambda sample: found)
    asked = []
    plain = SliceEncoder.decode

    def decode(self, image, k, window, prompts, *, zoom=False):
        asked.append(prompts[0])
        return plain(self, image, k, window, prompts, zoom=zoom)

    monkeypatch.setattr(SliceEncoder, "decode", decode)
    cell = Cell(turn, 3)
    for row in ROWS:
        asked.clear()
        row.make(row.name, cell)
        if row.name in (BASE, "bare"):
            assert not asked
            continue
        assert len(asked) == len(split.test)
        assert {prompt.box for prompt in asked} == {box}
        attention = row.name in ("attention", "lora")
        assert all((prompt.attention is not None) == attention for prompt in asked)
    for row in ORACLES:
        asked.clear()
        row.make(row.name, cell)
        assert {p.box for p in asked} == {true_box(s) for s in split.test if s.present}


def sammix_study(data, split, engine, out):
    from bench.papers.learners import Recipe
    from bench.papers.study import Study

    return Study(
        data=data,
        split=split,
        recipe=Recipe(size=32, iterations=1, batch=2, precision="float32"),
        encoder=SliceEncoder(engine=engine),
        out=out,
        tell=lambda text: None,
    )


def test_without_map_nothing_is_found_and_absent_empties_gated_rows(folder, engine, tmp_path, monkeypatch):
    data, split = one_label(folder)
    study = sammix_study(data, split, engine, tmp_path)
    turn = Turn(study, Mix(looks=1, schooling=sammix._QUICK.schooling), seed=0)
    frozen = next(row for row in ROWS if row.name == "frozen")
    silent = Look(present=True, activation=None, prompts=None)
    monkeypatch.setattr(turn, "look", lambda sample: silent)
    cell = Cell(turn, 3)
    assert (
        turn.learned_from(split.train[0]).box
        == central_prompts(SIDE, SIDE).box
        == (15.75, 15.75, 47.25, 47.25)
    )
    nothing = frozen.make("frozen", cell)
    assert not any(mask.any() for mask in nothing.predictions.values())
    assert nothing.figures["box_iou"] == 0
    whole = Prompts(box=(0.0, 0.0, SIDE - 1.0, SIDE - 1.0))
    absent = Look(present=False, activation=None, prompts=whole)
    monkeypatch.setattr(turn, "look", lambda sample: absent)
    gated = frozen.make("frozen", cell)
    assert not any(mask.any() for mask in gated.predictions.values())
    assert gated.figures["gated_dice"] == 0 and gated.figures["gated_false"] == 0


def test_quality_of_boxes_is_intersection_over_union(folder):
    samples = one_label(folder)[1].test
    positive = next(s for s in samples if s.present)
    exact = (positive.truth > 0).astype(np.float32)
    half = exact.copy()
    rows = np.flatnonzero(exact.any(1))
    half[rows[len(rows) // 2] :] *= 0.3
    for activation, wanted in ((exact, [1.0] * 5), (half, [1, 1, 0.5, 0.5, 0.5]), (None, [0.0] * 5)):
        looks = {positive.name: Look(present=True, activation=activation, prompts=None)}
        found = quality(looks, [positive])
        assert [line["threshold"] for line in found] == [0.2, 0.3, 0.4, 0.5, 0.6]
        assert [line["iou"] for line in found] == pytest.approx(wanted, abs=0.04)
    everywhere = {s.name: Look(present=True, activation=None, prompts=None) for s in samples}
    assert recognised(everywhere, samples)["present"] == 1
    negative = [s for s in samples if not s.present]
    assert np.isnan(recognised(everywhere, [positive])["absent"])
    assert negative and recognised(everywhere, samples)["absent"] == 0


def test_masks_are_drawn_of_images_with_the_label(folder):
    split = one_label(folder)[1]
    there = [s.name for s in split.train if s.present]
    assert len(there) < len(split.train)
    small, large = ({s.name for s in draw_positive(split, n, 0)} for n in (2, 4))
    assert small < large < set(there) and len(large) == 4
    assert [s.name for s in draw_positive(split, 99, 0)] == there


def test_no_prompt_is_what_sam_answers_without_one(folder, engine, tmp_path):
    data, split = one_label(folder)
    study = sammix_study(data, split, engine, tmp_path)
    sample, sam = split.test[0], engine.model
    features = study.encoder.embedding(sample.image, 0, sample.window)[0].features["image"]
    with torch.inference_mode():
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        low, _ = sam.mask_decoder(
            image_embeddings=features,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        masks, iou = bare_masks(sam, torch.cat([features] * 3))
        wanted = engine.framing.native(low, sample.size, sam)[0, 0] > 0
    side = frame_of(engine).low
    assert masks.shape == (3, 4, side, side) and iou.shape == (3, 4)
    for one in masks[:, 0]:
        torch.testing.assert_close(one, low[0, 0], atol=1e-5, rtol=1e-4)
    found = bare_answer(study, engine, untuned(engine, labels=data.labels, training={}), sample)
    assert np.array_equal(found, wanted.numpy())


def test_turned_pictures_keep_their_truth(folder):
    sample = read_set(folder).samples[1]
    other = turned(sample)
    assert np.array_equal(other.truth, np.rot90(sample.truth, 2))
    assert np.array_equal(other.image.array[:, :, 0], np.rot90(sample.image.array[:, :, 0], 2))
    assert other.image.key != sample.image.key
    assert np.array_equal(turned(other).truth, sample.truth)


def test_what_cannot_be_run_is_refused(folder, shifted, tmp_path, capsys, monkeypatch):
    assert command.run(arguments(folder, tmp_path, "--engine", "bundled")) == 2
    assert "tunes a SAM" in capsys.readouterr().err
    data = read_set(folder)
    with pytest.raises(InputError, match="choose one of 1, 2"):
        sammix.chosen_label(data, None)
    with pytest.raises(InputError, match="must have the label liver"):
        sammix.shifted_samples(str(shifted), "liver")
    assert sammix.shifted_samples(None, "1")[0] == ()
