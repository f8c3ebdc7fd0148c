"""What the rows of all tables have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from bench.papers.records import Outcome
from bench.papers.sets import LabelImage
from bench.papers.statistics import Judged
from bench.papers.study import Study


class Place(Protocol):
    """Where in a table a row is run."""

    @property
    def study(self) -> Study:
        """What all places share."""

    @property
    def n(self) -> int:
        """Labelled images."""

    @property
    def seed(self) -> int:
        """Of the draw and of the training."""


P = TypeVar("P", bound=Place)


@dataclass(frozen=True, kw_only=True)
class Row(Generic[P]):
    """A row of a table.

    Args:
        name: In ``--rows`` and in files.
        title: In the table.
        make: Name and place -> outcome.
        ablation: Run with the first seed only, and left out where a set's
            `bench.papers.sets.Defaults.ablated` says so.
        once: Does not depend on the number of labelled images.
        optional: Run only where it is asked for.
    """

    name: str
    title: str
    make: Callable[[str, P], Outcome]
    ablation: bool = False
    once: bool = False
    optional: bool = False


def outcome_of(
    place: Place,
    name: str,
    predictions: Mapping[str, LabelImage],
    *,
    seconds: float,
    drawn: int,
    trained: int,
    n: int | None = None,
    pseudo: Mapping[str, Judged] | None = None,
    own: Mapping[str, Judged] | None = None,
    clicks: int = 0,
    figures: Mapping[str, Any] | None = None,
) -> Outcome:
    """A row's outcome from its test predictions; the other arguments as in `Outcome`."""
    study = place.study
    return Outcome(
        row=name,
        n=place.n if n is None else n,
        seed=place.seed,
        test=study.judged(predictions, study.split.test, distance=True),
        pseudo=pseudo or {},
        own=own or {},
        seconds=seconds,
        drawn=drawn,
        trained=trained,
        clicks=clicks,
        figures=figures or {},
        predictions=predictions,
    )
