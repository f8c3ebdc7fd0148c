"""The tables of Ward and Imran, SAM-Mix (arXiv:2412.08575): are a classifier's boxes prompts for a SAM?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bench.papers import report, sammixtable
from bench.papers.pictures import draw_curves
from bench.papers.promptedsams import Schooling
from bench.papers.records import Outcome
from bench.papers.sammixcells import Mix, Turn
from bench.papers.sammixrows import BASE, ORACLES, ROWS, THEIRS, outcomes
from bench.papers.sets import LabelledSet, Sample, find_set, read_set
from bench.papers.split import Split
from bench.papers.study import Study
from sam_infer.errors import InputError

LABELLED = (5, 10, 25, 50)
#: The label where the command line names none and the set has several.
_LABEL = "liver"
_QUICK = Mix(looks=6, schooling=Schooling(steps=6, batch=4))
_DRAWN = (BASE, "box", THEIRS, "bare", "clinical")
#: To be raised with every change of these rows' code that changes figures.
_VERSION = 1


def run(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    """Run what is missing, write tables, figures and pictures; the text to print."""
    report.sam_of(study)
    mix = _QUICK if args.quick else Mix()
    if args.steps is not None:
        mix = replace(mix, schooling=replace(mix.schooling, steps=args.steps))
    label = chosen_label(study.data, args.label)
    data, split = of_label(study.data, study.split, label)
    shifted, away = shifted_samples(args.shifted, label)
    study = study.extended("sammix", _VERSION, mix, data=data, split=split)
    turns = [Turn(study, mix, seed=seed, shifted=shifted) for seed in range(options["seeds"])]
    there = sum(bool(sample.present) for sample in split.train)
    labelled = sorted({min(n, there) for n in options["labelled"]})
    rows = report.chosen_rows((*ROWS, *ORACLES), args, base=BASE)
    titles = {row.name: row.title for row in rows}
    honest = [row.name for row in rows if row in ROWS]
    oracles = [row.name for row in rows if row not in honest and row in ORACLES]
    boxes, right = sammixtable.quality_lines(turns), sammixtable.recognition(turns)
    first = sammixtable.quality_table(boxes, right)
    study.tell(first)
    done: list[Outcome] = []
    for new in outcomes(turns, rows, labelled=labelled):
        done += new
        lines = sammixtable.row_lines(done, honest)
        known = sammixtable.row_lines(done, oracles)
        beside = sammixtable.beside_unets(done, "frozen")
        parts = [first, sammixtable.table(lines, titles)]
        parts += [sammixtable.beside_table(beside, titles)] if beside else []
        parts += [said] if (said := sammixtable.attention_words(lines)) else []
        parts += [f"With boxes of the truth:\n\n{sammixtable.oracle_table(known, titles)}"] if known else []
        told = f"Label {label}. {report.words(study, options)}\n\n{sammixtable.words(turns[0], mix, away)}"
        text = "\n".join([*parts, told])
        record = {"boxes": boxes, "recognised": right, "lines": lines, "beside": beside, "oracles": known}
        report.write(study.out / "sammix", text, record)
    shown = {name: titles[name].strip("*") for name in _DRAWN if name in titles}
    draw_curves(study.out / "sammix_curves.png", lines, shown, over="images with masks")
    largest = [one for one in done if one.seed == 0 and one.n in (0, labelled[-1])]
    looks = turns[0].looks(split.test)
    given = {name: one.prompts.box for name, one in looks.items() if one.prompts and one.present}
    columns = {name: titles[name] for name in ("frozen", *_DRAWN) if name in titles}
    paper = THEIRS if THEIRS in titles else BASE
    report.picture(study, "sammix", largest, columns, paper=paper, boxes=given)
    return text


def chosen_label(data: LabelledSet, label: str | None) -> str:
    """The label that is looked for.

    Raises:
        InputError: When the set has no such label, or several and none is named.
    """
    known = list(data.labels)
    name = label or (known[0] if len(known) == 1 else _LABEL)
    if name not in known:
        raise InputError("label", label, f"choose one of {', '.join(known)}")
    return name


def of_label(data: LabelledSet, split: Split, label: str) -> tuple[LabelledSet, Split]:
    """A set with one of its labels alone; the images without it stay.

    Raises:
        InputError: When a part has no image with the label.
    """
    value = data.labels[label]
    kept = Split(train=only(split.train, value), test=only(split.test, value))
    for what, part in (("to learn from", kept.train), ("to test", kept.test)):
        if not any(sample.present for sample in part):
            raise InputError("label", label, f"no image {what} holds it; choose another")
    return replace(data, labels={label: value}, samples=only(data.samples, value)), kept


def only(samples: tuple[Sample, ...], value: int) -> tuple[Sample, ...]:
    """Images with one label value alone."""
    return tuple(replace(s, truth=np.where(s.truth == value, s.truth, 0).astype(np.uint8)) for s in samples)


def shifted_samples(name: str | None, label: str) -> tuple[tuple[Sample, ...], str]:
    """The images of another set with its own value of a label, and what is said of them.

    Raises:
        InputError: When there is no such set, or no such label in it.
    """
    if name is None:
        return (), "no set was named (--shifted)"
    data = read_set(find_set(name))
    if label not in data.labels:
        raise InputError("shifted", name, f"it must have the label {label}, and has {', '.join(data.labels)}")
    samples = only(data.samples, data.labels[label])
    there = sum(bool(sample.present) for sample in samples)
    turned = ", turned upright" if data.defaults.turned else ""
    return samples, f"mean over the {there} images of {data.name} that hold the label{turned}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shifted", help="another set with the label, to be tested on too (sammix)")
    parser.add_argument(
        "--steps", type=int, help=f"steps of each tuning of a SAM (sammix; default: {Schooling.steps})"
    )


PAPER = report.Paper(
    name="sammix", run=run, engine="sam_tiny", defaults={"labelled": LABELLED}, arguments=_arguments
)
