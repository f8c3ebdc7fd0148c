"""Rows of Keuth et al., SAM Carries the Burden (arXiv:2411.12602), with every control beside them.

A U-Net learns from a few labelled images; what it sees in the others is cleaned, refined by SAM, and a second
U-Net learns from that alone. Test images are in no pool.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from bench.papers import report, tables
from bench.papers.annotated import annotated
from bench.papers.learners import learn_as_mean_teacher, truths
from bench.papers.nnunet import learn_and_predict
from bench.papers.pictures import draw_curves
from bench.papers.pseudo import Cell
from bench.papers.records import Labels, Outcome
from bench.papers.rows import Row, outcome_of
from bench.papers.study import Study
from sam_infer.refine import KEUTH, Scheme

BASE, THEIRS, NNUNET = "unet", "theirs", "nnunet"
#: This project's own: every large part of a label is an object.
PARTS = Scheme(keep="parts")
_SLOW = ("dilated-4", "dilated-16")
_DRAWN: tuple[str, ...] = (BASE, "self-raw", THEIRS, "parts", "parts-mixed", "mean-teacher", "all")


def outcomes(
    study: Study, rows: Sequence[Row[Cell]], *, labelled: Sequence[int], seeds: int
) -> Iterator[list[Outcome]]:
    """Run rows for all numbers of labelled images and all seeds; gives what is new after each of these.

    Args:
        study: The set and how it is learned from.
        rows: Of `ROWS`.
        labelled: Numbers of labelled images.
        seeds: Number of draws and trainings.
    """
    ablated = study.data.defaults.ablated
    everywhere = not set(ablated) & set(labelled)
    for seed in range(seeds):
        for number, n in enumerate(labelled):
            cell = Cell(study, n, seed)
            wanted = [
                row
                for row in rows
                if not (row.once and number)
                and (not row.ablation or (not seed and (everywhere or n in ablated)))
            ]
            yield [
                study.outcome(
                    row.name,
                    len(study.split.train) if row.once else n,
                    seed,
                    partial(row.make, row.name, cell),
                )
                for row in wanted
            ]


def _unet(name: str, cell: Cell) -> Outcome:
    test = cell.study.tested(cell.first)
    return outcome_of(cell, name, test, seconds=cell.first.seconds, drawn=cell.n, trained=cell.n)


def _mended(name: str, cell: Cell, *, labels: Callable[[Cell], Labels]) -> Outcome:
    """The first network's test predictions, changed; nothing is trained."""
    found = labels(cell)
    return outcome_of(cell, name, found.maps, seconds=found.seconds, drawn=cell.n, trained=cell.n)


def _retrained(name: str, cell: Cell, *, labels: Callable[[Cell], Labels], mixed: bool = False) -> Outcome:
    """A new network from pseudo labels of the pool alone, or with the labelled images among them."""
    found, draw = labels(cell), cell.draw
    learned = cell.learn(
        (*draw.pool, *(draw.labelled if mixed else ())),
        {**found.maps, **(truths(draw.labelled) if mixed else {})},
    )
    return outcome_of(
        cell,
        name,
        cell.study.tested(learned),
        seconds=found.seconds + learned.seconds,
        drawn=cell.n,
        trained=len(draw.pool) + (cell.n if mixed else 0),
        pseudo=cell.study.judged(found.maps, draw.pool, distance=False),
    )


def _oracle(name: str, cell: Cell, *, strategy: str) -> Outcome:
    """Tight boxes of the truth in place of the network's: is it the engine or the prompts?"""
    pool = cell.draw.pool
    found = annotated(cell.study, strategy, pool)
    learned = cell.learn(pool, found.maps)
    return outcome_of(
        cell,
        name,
        cell.study.tested(learned),
        seconds=found.seconds + learned.seconds,
        drawn=0,
        trained=len(pool),
        pseudo=cell.study.judged(found.maps, pool, distance=False),
        clicks=found.clicks,
    )


def _mean_teacher(name: str, cell: Cell) -> Outcome:
    study, draw = cell.study, cell.draw
    learned = learn_as_mean_teacher(
        draw.labelled, draw.pool, labels=study.data.labels, recipe=study.recipe, seed=cell.seed
    )
    trained = len(study.split.train)
    return outcome_of(
        cell, name, study.tested(learned), seconds=learned.seconds, drawn=cell.n, trained=trained
    )


def _supervised(name: str, cell: Cell) -> Outcome:
    samples = cell.study.split.train
    learned = cell.learn(samples)
    test, count = cell.study.tested(learned), len(samples)
    return outcome_of(cell, name, test, n=count, seconds=learned.seconds, drawn=count, trained=count)


def _nnunet(name: str, cell: Cell) -> Outcome:
    study, start = cell.study, time.monotonic()
    test = learn_and_predict(
        cell.draw.labelled,
        study.split.test,
        labels=study.data.labels,
        size=study.recipe.size,
        folder=study.out / "nnunet",
    )
    return outcome_of(cell, name, test, seconds=time.monotonic() - start, drawn=cell.n, trained=cell.n)


def _by(scheme: Scheme) -> Callable[[Cell], Labels]:
    return lambda cell: cell.refined(scheme)[0]


def _after(name: str, title: str, labels: Callable[[Cell], Labels]) -> Row[Cell]:
    return Row(name=name, title=title, make=partial(_mended, labels=labels))


def _from(name: str, title: str, labels: Callable[[Cell], Labels], *, ablation: bool = False) -> Row[Cell]:
    return Row(name=name, title=title, make=partial(_retrained, labels=labels), ablation=ablation)


ROWS: tuple[Row[Cell], ...] = (
    Row(name=BASE, title="U-Net", make=_unet),
    _after("cleaned", "U-Net, cleaned", lambda cell: cell.masks("best", test=True)),
    _after("walk", "U-Net, random walk", lambda cell: cell.walked()),
    _after("sam", "U-Net, SAM afterwards", lambda cell: cell.refined(test=True)[0]),
    _from("self-raw", "self-training, raw", lambda cell: cell.masks()),
    _from("self-cleaned", "self-training, cleaned", lambda cell: cell.masks("best")),
    _from("box", "self-training, SAM: box", _by(Scheme(first="box", second="none")), ablation=True),
    _from(THEIRS, "**self-training, SAM: box, then seeds (the paper's)**", _by(KEUTH)),
    _from("seeds", "self-training, SAM: seeds", _by(Scheme(first="points", second="none")), ablation=True),
    *(
        _from(f"dilated-{n}", f"the paper's, dilated by {n}", _by(Scheme(dilation=n)), ablation=True)
        for n in (4, 8, 16)
    ),
    _from("interior", "the paper's, interior seeds", _by(Scheme(seed="interior")), ablation=True),
    _from("filtered", "the paper's, filtered", lambda cell: cell.refined()[1], ablation=True),
    _from("parts", "the paper's, each part by itself", _by(PARTS)),
    *(
        Row(
            name=f"{name}-mixed",
            ablation=name != "raw",
            title=f"{title}, labelled images among them",
            make=partial(_retrained, labels=labels, mixed=True),
        )
        for name, title, labels in (
            ("raw", "self-training, raw", lambda cell: cell.masks()),
            ("theirs", "the paper's", _by(KEUTH)),
            ("parts", "each part by itself", _by(PARTS)),
        )
    ),
    *(
        Row(
            name=name,
            title=f"self-training, SAM: {title}",
            make=partial(_oracle, strategy=strategy),
            ablation=True,
        )
        for name, title, strategy in (
            ("oracle", "true box of each label", "box_class"),
            ("oracle-parts", "true box of each part", "box_component"),
        )
    ),
    Row(name="mean-teacher", title="mean teacher", make=_mean_teacher),
    Row(name=NNUNET, title="nnU-Net", make=_nnunet, optional=True),
    Row(name="all", title="U-Net, all labelled (upper bound)", make=_supervised, once=True),
)


def run(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    """Run what is missing, write the table and the pictures; the text to print."""
    also = [NNUNET] if args.nnunet else []
    rows = report.chosen_rows(ROWS, args, base=BASE, slow=_SLOW, also=also)
    titles = {row.name: row.title for row in rows}
    done: list[Outcome] = []
    text = ""
    for new in outcomes(study, rows, labelled=options["labelled"], seeds=options["seeds"]):
        done += new
        lines = report.summaries(done, list(titles), BASE)
        text = f"{tables.keuth_table(lines, titles)}\n{report.words(study, options)}\n\n{tables.NOTES}"
        report.write(study.out / "keuth", text, {"lines": lines})
    shown = {name: titles[name] for name in _DRAWN if name in titles}
    draw_curves(study.out / "keuth_curves.png", lines, {n: t.strip("*") for n, t in shown.items()})
    largest = [o for o in done if o.n in (max(options["labelled"]), len(study.split.train)) and o.seed == 0]
    report.picture(study, "keuth", largest, shown, paper=THEIRS if THEIRS in titles else BASE)
    return text


PAPER = report.Paper(name="keuth", run=run)
