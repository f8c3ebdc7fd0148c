"""Rows of Ward and Imran, SAM-Mix (arXiv:2412.08575), with every control beside them, and oracles apart.

A classifier of image-level labels looks for an organ; the box of what stands out in its activation map
prompts a SAM that learned from a few masks. Boxes of the truth prompt in `ORACLES` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.papers.camlooks import box_overlap, true_box
from bench.papers.learners import learn, truths
from bench.papers.promptedsams import (
    Kind,
    answering,
    attention_weight,
    bare_answer,
    given_as,
)
from bench.papers.records import Outcome
from bench.papers.rows import Row, outcome_of
from bench.papers.sammixcells import Cell, Turn
from bench.papers.sets import LabelImage, Sample
from bench.papers.statistics import judge, mean_dice
from sam_infer.embeddings import SliceEncoder
from sam_infer.types import BoolArray, Prompts

BASE, THEIRS = "unet", "attention"
Answer = Callable[[Sample], BoolArray]


def outcomes(
    turns: Sequence[Turn], rows: Sequence[Row[Cell]], *, labelled: Sequence[int]
) -> Iterator[list[Outcome]]:
    """Run rows for all seeds and numbers of masks; gives what is new after each of these.

    Args:
        turns: The seeds.
        rows: Of `ROWS` and `ORACLES`.
        labelled: Numbers of images with masks. Ablations are run at one of them, with the first seed.
    """
    at = set(turns[0].study.data.defaults.ablated) & set(labelled) or {labelled[-1]}
    for turn in turns:
        for number, n in enumerate(labelled):
            cell = Cell(turn, n)
            wanted = [
                row
                for row in rows
                if not (row.once and number) and not (row.ablation and (turn.seed or n not in at))
            ]
            yield [
                turn.rows.outcome(
                    row.name, 0 if row.once else n, turn.seed, partial(row.make, row.name, cell)
                )
                for row in wanted
            ]


def _unet(name: str, cell: Cell) -> Outcome:
    study = cell.turn.study

    def make() -> Any:
        return learn(
            cell.labelled,
            truths(cell.labelled),
            labels=study.data.labels,
            recipe=study.recipe,
            seed=cell.seed,
        )

    learned = study.learned(name, cell.n, cell.seed, make)
    return _tested(
        name, cell, lambda s: learned.predict(s) > 0, seconds=learned.seconds, gated=False, boxed=False
    )


def _prompted(name: str, cell: Cell, *, kind: Kind | None) -> Outcome:
    """The box of the activation map prompts the SAM as it is (None), or one tuned on the masks."""
    turn = cell.turn
    model = None if kind is None else cell.tuned(kind)
    encoder = answering(turn.study, turn.base, model)

    def answer(sample: Sample) -> BoolArray:
        given = turn.look(sample).prompts
        return _asked(encoder, sample, None if given is None else given_as(kind or "box", given))

    seconds = float(turn.classifier.training["seconds"])
    seconds += 0.0 if model is None else float(model.training["seconds"])
    told = {"attention": weight} if (weight := attention_weight(model)) is not None else {}
    return _tested(
        name, cell, answer, seconds=seconds, gated=True, boxed=True, masks=kind is not None, told=told
    )


def _bare(name: str, cell: Cell) -> Outcome:
    turn, model = cell.turn, cell.tuned("bare")
    seconds = float(model.training["seconds"])
    answer = partial(bare_answer, turn.study, turn.base, model)
    return _tested(name, cell, answer, seconds=seconds, gated=False, boxed=False)


def _oracle(name: str, cell: Cell, *, kind: Kind | None) -> Outcome:
    """The true box prompts: what boxes cost, and no result that could be had without the truth."""
    model = None if kind is None else cell.tuned(kind)
    encoder, start = answering(cell.turn.study, cell.turn.base, model), time.monotonic()

    def answer(sample: Sample) -> BoolArray:
        box = true_box(sample)
        return _asked(encoder, sample, None if box is None else Prompts(box=box))

    test = {s.name: answer(s) for s in cell.study.split.test}
    seconds = time.monotonic() - start + (0.0 if model is None else float(model.training["seconds"]))
    there = [s for s in cell.turn.shifted if s.present]
    figures = {"box_iou": 1.0, "shifted_dice": _mean_dice(cell, there, answer), "image_labels": 0}
    return _kept(name, cell, test, seconds=seconds, masks=model is not None, figures=figures)


def _asked(encoder: SliceEncoder, sample: Sample, given: Prompts | None) -> BoolArray:
    """(H, W) bool; without a prompt nothing is found."""
    if given is None:
        return np.zeros(sample.size, bool)
    found: BoolArray = encoder.decode(sample.image, 0, sample.window, [given], zoom=False)[0].mask()
    return found


def _tested(
    name: str,
    cell: Cell,
    answer: Answer,
    *,
    seconds: float,
    gated: bool,
    boxed: bool,
    masks: bool = True,
    told: Mapping[str, float] | None = None,
) -> Outcome:
    """An outcome with what a row says of all images, and what is left of that where the label is present.

    Args:
        name: Of the row.
        cell: Its place.
        answer: What it says of an image, whether the classifier sees the label there or not.
        seconds: That its networks took.
        gated: Whether the row's own figures are those where the classifier has a say.
        boxed: Whether boxes of activation maps prompt it.
        masks: Whether it learned from the draw's masks.
        told: Further figures.
    """
    turn, start = cell.turn, time.monotonic()
    test = cell.study.split.test
    plain = {sample.name: answer(sample) for sample in test}
    seconds += time.monotonic() - start
    kept = {s.name: plain[s.name] & turn.look(s).present for s in test}
    judged = {"ungated": plain, "gated": kept}
    away = [sample for sample in turn.shifted if sample.present]
    figures: dict[str, Any] = {
        **(told or {}),
        **{f"{how}_dice": mean_dice(_judged(cell, test, some)) for how, some in judged.items()},
        **{f"{how}_false": _false_positives(test, some) for how, some in judged.items()},
        "shifted_dice": _mean_dice(
            cell, away, lambda s: answer(s) & (turn.look(s).present if gated else True)
        ),
        "image_labels": len(cell.study.split.train) if gated else 0,
    }
    if boxed:
        boxes = {s.name: (p.box if (p := turn.look(s).prompts) else None) for s in test}
        overlaps = [o for s in test if (o := box_overlap(boxes[s.name], s)) is not None]
        figures["box_iou"] = float(np.mean(overlaps))
    shown = kept if gated else plain
    return _kept(name, cell, shown, seconds=seconds, masks=masks, figures=figures)


def _kept(
    name: str,
    cell: Cell,
    masks_found: Mapping[str, BoolArray],
    *,
    seconds: float,
    masks: bool,
    figures: Mapping[str, Any],
) -> Outcome:
    return outcome_of(
        cell,
        name,
        {key: _as_labels(cell, mask) for key, mask in masks_found.items()},
        n=cell.n if masks else 0,
        seconds=seconds,
        drawn=len(cell.labelled) if masks else 0,
        trained=len(cell.labelled) if masks else 0,
        figures=figures,
    )


def _as_labels(cell: Cell, mask: BoolArray) -> LabelImage:
    (value,) = cell.study.data.labels.values()
    return (mask * value).astype(np.uint8)


def _judged(cell: Cell, samples: Sequence[Sample], masks: Mapping[str, BoolArray]) -> dict[str, Any]:
    labels = cell.study.data.labels
    return {
        s.name: judge(_as_labels(cell, masks[s.name]), _as_labels(cell, s.truth > 0), labels, distance=False)
        for s in samples
    }


def _mean_dice(cell: Cell, samples: Sequence[Sample], answer: Answer) -> float:
    return mean_dice(_judged(cell, samples, {sample.name: answer(sample) for sample in samples}))


def _false_positives(samples: Sequence[Sample], masks: Mapping[str, BoolArray]) -> float:
    """Share of the images without the label in which something is found; nan without any."""
    found = [bool(masks[sample.name].any()) for sample in samples if not sample.present]
    return float(np.mean(found)) if found else float("nan")


def _box(name: str, title: str, kind: Kind, *, ablation: bool = False) -> Row[Cell]:
    return Row(name=name, title=title, make=partial(_prompted, kind=kind), ablation=ablation)


ROWS: tuple[Row[Cell], ...] = (
    Row(name=BASE, title="U-Net", make=_unet),
    Row(name="frozen", title="SAM frozen, CAM box", make=partial(_prompted, kind=None), once=True),
    _box("box", "decoder tuned, CAM box", "box"),
    _box(THEIRS, "**decoder tuned, CAM box and mask**", "attention"),
    Row(name="bare", title="decoder tuned, no prompt", make=_bare),
    _box("lora", "LoRA in the encoder, CAM box and mask", "lora", ablation=True),
    _box("clinical", "decoder tuned by clinicians' prompts, CAM box", "clinical"),
)
ORACLES: tuple[Row[Cell], ...] = (
    Row(name="oracle", title="SAM frozen, true box", make=partial(_oracle, kind=None), once=True),
    Row(name="oracle-box", title="decoder tuned on CAM boxes, true box", make=partial(_oracle, kind="box")),
    Row(
        name="oracle-clinical",
        title="decoder tuned by clinicians' prompts, true box",
        make=partial(_oracle, kind="clinical"),
    ),
)
