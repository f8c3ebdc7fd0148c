"""Rows of Häkkinen et al., Medical Image Segmentation with SAM-generated Annotations (arXiv:2409.20253).

An annotator prompts SAM for every object; what it answers trains a U-Net, which is compared with one that was
trained on the truth, and with one trained on a truth that was made as wrong as the answers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bench.papers.annotated import annotated, noisy
from bench.papers.learners import learn, truths
from bench.papers.records import Labels, Outcome
from bench.papers.rows import Row, outcome_of
from bench.papers.statistics import Judged
from bench.papers.study import Study

BASE, THEIRS, NOISE = "truth", "box_class", "noise"
#: Strategies whose labels train a U-Net.
TRAINED = (THEIRS, "box_component", "box_jitter5", "box_jitter20", "point", "points5", "box_point")


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
