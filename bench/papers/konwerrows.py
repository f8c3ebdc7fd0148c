"""Rows of Konwer et al., Enhancing SAM with Efficient Prompting and Preference Optimization.

arXiv:2503.04639. A SAM is tuned on few labelled images (stage 1); of further images its own candidate masks
are rated or ranked, and its mask decoder learns to prefer what was preferred (stage 2). Every row has the
same prompts, but for those that say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.papers.aligning import Feedback, align
from bench.papers.policy import Kind, Policy, Start, as_logit
from bench.papers.records import Outcome
from bench.papers.rows import Row, outcome_of
from bench.papers.study import Study

BASE, THEIRS = "stage1", "ranking"
NOISE = (0.1, 0.2, 0.3)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One row at one place of the table.

    Args:
        start: What the rows of a seed share.
        n: Images of stage 2; 0 = there is no stage 2.
    """

    start: Start
    n: int

    @property
    def study(self) -> Study:
        """What all share."""
        return self.start.study

    @property
    def seed(self) -> int:
        """Of the draw and of the trainings."""
        return self.start.seed


@dataclass(frozen=True, kw_only=True)
class Line(Row[Turn]):
    """A row, which may be shown at the middle number of images alone.

    Args:
        middle: Whether it is.
    """

    middle: bool = False


def outcomes(starts: Sequence[Start], rows: Sequence[Line], counts: Sequence[int]) -> Iterator[list[Outcome]]:
    """Run rows for all seeds and numbers of images of stage 2; gives what is new after each seed.

    Args:
        starts: One of each seed.
        rows: Of `ROWS`; those of `Row.once` have no stage 2.
        counts: Numbers of images of stage 2, ascending.
    """
    middle = counts[len(counts) // 2]
    for start in starts:
        done = []
        for row in rows:
            if row.ablation and start.seed:
                continue
            places = (0,) if row.once else (middle,) if row.middle or row.ablation else counts
            for n in places:
                make = partial(row.make, row.name, Turn(start=start, n=n))
                done.append(start.study.outcome(row.name, n, start.seed, make))
        yield done


def _tuned(name: str, turn: Turn, *, kind: Kind = "box") -> Outcome:
    return _judged(name, turn, turn.start.first(kind))


def _cut(name: str, turn: Turn, *, policy: Callable[[Turn], tuple[Policy, bool]]) -> Outcome:
    """Another policy's answers at the best threshold of the labelled images."""
    found, informed = policy(turn)
    return _judged(name, turn, found, rated=informed, threshold=turn.start.best_threshold(found))


def _supervised(name: str, turn: Turn) -> Outcome:
    policy = turn.start.first(more=turn.n)
    return _judged(name, turn, policy, drawn=len(turn.start.draw.labelled) + turn.n)


def _preferred(name: str, turn: Turn, *, feedback: Feedback) -> Outcome:
    policy, figures = _aligned(turn, feedback)
    return _judged(name, turn, policy, rated=feedback.informed, figures=figures)


def _aligned(turn: Turn, feedback: Feedback) -> tuple[Policy, dict[str, Any]]:
    return align(turn.start, turn.start.first(), turn.start.pool[: turn.n], feedback)


def _judged(
    name: str,
    turn: Turn,
    policy: Policy,
    *,
    drawn: int | None = None,
    rated: bool = False,
    threshold: float = 0.5,
    figures: Mapping[str, Any] | None = None,
) -> Outcome:
    study, labelled = turn.study, len(turn.start.draw.labelled)
    logits, value = turn.start.logits(policy, study.split.test), study.data.labels[turn.start.label]
    predictions = {
        k: np.where(one > as_logit(threshold), value, 0).astype(np.uint8) for k, one in logits.items()
    }
    return outcome_of(
        turn,
        name,
        predictions,
        seconds=policy.seconds,
        drawn=labelled if drawn is None else drawn,
        trained=labelled + turn.n,
        figures={"threshold": threshold, "rated": turn.n if rated else 0, **(figures or {})},
    )


def _of(name: str, title: str, **more: Any) -> Line:
    """A row of stage 2; the other arguments are those of `Feedback` and `Line`."""
    shown = {key: more.pop(key) for key in ("middle", "ablation") if key in more}
    return Line(name=name, title=title, make=partial(_preferred, feedback=Feedback(**more)), **shown)


#: Rows of stage 1 with other prompts.
TOLD: tuple[tuple[str, str, Kind], ...] = (
    ("text", "box and text", "box+text"),
    ("whole", "no box", "whole"),
    ("whole-text", "text and no box", "whole+text"),
)
ROWS: tuple[Line, ...] = (
    Line(name=BASE, title="stage 1 only", make=_tuned, once=True),
    Line(
        name="threshold",
        title="stage 1, best threshold of the labelled images",
        make=partial(_cut, policy=lambda turn: (turn.start.first(), False)),
        once=True,
    ),
    _of("best", "best candidate as pseudo label (truth chooses)", best=True),
    _of("rating", "rating (by truth)", annotator="rating"),
    _of("rating-noise20", "rating, 20% swapped", annotator="rating", noise=0.2, middle=True),
    _of(THEIRS, "**ranking (by truth; the paper's)**"),
    *(
        _of(f"noise{100 * share:.0f}", f"ranking, {share:.0%} swapped", noise=share, middle=True)
        for share in NOISE
    ),
    Line(
        name="ranking-threshold",
        title="ranking, best threshold of the labelled images",
        make=partial(_cut, policy=lambda turn: (_aligned(turn, Feedback())[0], True)),
        middle=True,
    ),
    _of("predicted", "SAM's three masks by predicted IoU (no truth)", source="masks", annotator="prediction"),
    _of("masks", "SAM's three masks, ranked by truth", source="masks", middle=True),
    _of("dropout", "four masks by dropout, ranked by truth", source="dropout", middle=True),
    _of("random", "random ranking (no truth)", annotator="chance"),
    Line(name="supervised", title="supervised with the same images (upper bound)", make=_supervised),
    _of("betas2", "ranking, weights 2 and 1", betas=(2.0, 1.0), ablation=True),
    _of("betas1.5", "ranking, weights 1.5 and 0.75", betas=(1.5, 0.75), ablation=True),
    *(
        Line(name=name, title=f"stage 1, {title}", make=partial(_tuned, kind=kind), once=True, ablation=True)
        for name, title, kind in TOLD
    ),
)
