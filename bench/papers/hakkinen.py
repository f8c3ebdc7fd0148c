"""Rows of Häkkinen et al., Medical Image Segmentation with SAM-generated Annotations (arXiv:2409.20253).

An annotator prompts SAM for every object; what it answers trains a U-Net, which is compared with one that was
trained on the truth, and with one trained on a truth that was made as wrong as the answers are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.papers import report, tables
from bench.papers.annotated import annotated, noisy
from bench.papers.learners import learn, truths
from bench.papers.records import Labels, Outcome
from bench.papers.rows import Row, outcome_of
from bench.papers.statistics import Judged
from bench.papers.study import Study
from sam_infer.prompts.annotator import STRATEGIES

BASE, THEIRS, NOISE = "truth", "box_class", "noise"
#: Strategies whose labels train a U-Net.
TRAINED = (THEIRS, "box_component", "box_jitter5", "box_jitter20", "point", "points5", "box_point")
_SLOW = ("box_jitter5", "box_component", "points5")
_SHOWN: tuple[str, ...] = (BASE, "box_component", "box_jitter20", "point", NOISE)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One seed.

    Args:
        study: What all share.
        n: Images that are trained on, all outside the test part.
        seed: Of the training; labels do not depend on it.
    """

    study: Study
    n: int
    seed: int


def outcomes(study: Study, rows: Sequence[Row[Turn]], *, seeds: int) -> Iterator[list[Outcome]]:
    """Run rows for all seeds; gives what is new after each seed."""
    n = len(study.split.train)
    for seed in range(seeds):
        turn = Turn(study=study, n=n, seed=seed)
        yield [study.outcome(row.name, n, seed, partial(row.make, row.name, turn)) for row in rows]


def labellings(study: Study, names: Sequence[str]) -> Iterator[Outcome]:
    """What each strategy's labels are worth by themselves, on training and test images."""
    for name in names:
        yield _labelling(study, name)


def _labelling(study: Study, strategy: str) -> Outcome:
    def make() -> Outcome:
        found, own = (annotated(study, strategy, part) for part in (study.split.train, study.split.test))
        return Outcome(
            row=f"labels-{strategy}",
            n=len(study.split.train),
            seed=0,
            test={},
            pseudo=study.judged(found.maps, study.split.train, distance=False),
            own=study.judged(own.maps, study.split.test, distance=False),
            seconds=found.seconds,
            drawn=0,
            trained=len(study.split.train),
            clicks=found.clicks,
        )

    return study.outcome(f"labels-{strategy}", len(study.split.train), 0, make)


def _from_truth(name: str, turn: Turn) -> Outcome:
    return _learned(name, turn, Labels(maps=truths(turn.study.split.train), seconds=0.0), drawn=turn.n)


def _from_strategy(name: str, turn: Turn) -> Outcome:
    study = turn.study
    labels = annotated(study, name, study.split.train)
    known = _labelling(study, name)
    return _learned(name, turn, labels, drawn=0, pseudo=known.pseudo, own=known.own)


def _from_noise(name: str, turn: Turn) -> Outcome:
    study = turn.study
    box = _labelling(study, THEIRS)
    parts = ((study.split.train, box.pseudo), (study.split.test, box.own))
    train, test = (
        {s.name: noisy(s, judged[s.name], study.data.labels, seed=turn.seed) for s in samples}
        for samples, judged in parts
    )
    return _learned(
        name,
        turn,
        Labels(maps=train, seconds=0.0),
        drawn=turn.n,
        pseudo=study.judged(train, study.split.train, distance=False),
        own=study.judged(test, study.split.test, distance=False),
    )


def _learned(
    name: str,
    turn: Turn,
    labels: Labels,
    *,
    drawn: int,
    pseudo: Mapping[str, Judged] | None = None,
    own: Mapping[str, Judged] | None = None,
) -> Outcome:
    study = turn.study
    learned = learn(
        study.split.train, labels.maps, labels=study.data.labels, recipe=study.recipe, seed=turn.seed
    )
    return outcome_of(
        turn,
        name,
        study.tested(learned),
        seconds=labels.seconds + learned.seconds,
        drawn=drawn,
        trained=turn.n,
        pseudo=pseudo,
        own=own,
        clicks=labels.clicks,
    )


def _of(strategy: str) -> Row[Turn]:
    return Row(name=strategy, title=f"pseudo labels: {strategy}", make=_from_strategy)


ROWS: tuple[Row[Turn], ...] = (
    Row(name=BASE, title="truth", make=_from_truth),
    *(_of(strategy) for strategy in TRAINED),
    Row(name=NOISE, title=f"truth, as wrong as {THEIRS}", make=_from_noise),
)


def run(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    """Run what is missing, write the tables and the picture; the text to print."""
    rows = report.chosen_rows(ROWS, args, base=BASE, slow=_SLOW)
    if options["strategies"] and not args.rows:
        kept = (*options["strategies"], BASE, NOISE)
        rows = [row for row in rows if row.name in kept]
    titles = {row.name: row.title for row in rows}
    labels = list(study.data.labels)
    first = tables.strategy_lines(list(labellings(study, list(STRATEGIES))), labels)
    done: list[Outcome] = []
    text = ""
    for new in outcomes(study, rows, seeds=options["seeds"]):
        done += new
        lines = report.summaries(done, list(titles), BASE)
        both = (tables.strategy_table(first, labels), tables.hakkinen_table(lines, titles))
        text = f"{both[0]}\n{both[1]}\n{report.words(study, options)}\n\n{tables.NOTES}"
        report.write(study.out / "hakkinen", text, {"strategies": first, "lines": lines})
    shown = {name: titles[name] for name in _SHOWN if name in titles}
    paper = THEIRS if THEIRS in titles else BASE
    report.picture(study, "hakkinen", [o for o in done if o.seed == 0], shown, paper=paper)
    return text


PAPER = report.Paper(name="hakkinen", run=run)
