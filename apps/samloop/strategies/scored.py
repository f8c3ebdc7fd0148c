"""Strategies that give every case a figure and choose by it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.samloop.strategies.order import Open, at_random, drawn
from apps.samloop.strategies.survey import ReadImage, Survey, WindowFor
from sam_infer.intensity import Window
from sam_infer.volumes import Image


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who gives the figures.

    Args:
        figure: The figure of an image with its window.
        fingerprint: What it follows from beside the image.
        facts: Told with the answer.
    """

    figure: Callable[[Image, Window], float]
    fingerprint: str
    facts: Mapping[str, Any]


class Scored(Open):
    """The open case with the highest, or lowest, figure of some drawn at random.

    Args:
        name: Of the strategy.
        figure: Name of the figure.
        chosen: In words, what the chosen one is: "least confident".
        highest: Whether the highest figure is chosen.
        read: Path to image; a cached reader.
        window_for: The window of an image for a request.
        candidates: Open cases looked at per call, a random subset.
        seconds: No further case is looked at after this time.
        description: For people; what is drawn within which time is added.
    """

    def __init__(
        self,
        *,
        name: str,
        figure: str,
        chosen: str,
        highest: bool,
        read: ReadImage,
        window_for: WindowFor,
        candidates: int,
        seconds: float,
        description: str,
    ) -> None:
        super().__init__(
            f"{description}, of up to {candidates} drawn at random and looked at within {seconds:g} s"
        )
        self._name = name
        self._figure = figure
        self._words = chosen
        self._sign = -1 if highest else 1
        self._candidates = candidates
        self._seconds = seconds
        self._survey: Survey[float] = Survey(read=read, window_for=window_for)

    @abstractmethod
    def _judge(self) -> Judge | str:
        """Who gives the figures now, or why nobody does."""

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        draw = drawn(request)
        judge = self._judge()
        if isinstance(judge, str):
            return at_random(draw, ids, judge)
        some = draw.sample(ids, min(self._candidates, len(ids)))
        seen = self._survey.see(
            some, datastore, judge.figure, made_by=judge.fingerprint, seconds=self._seconds
        )
        if not seen.values:
            return at_random(draw, ids, f"none of {len(seen.unreadable)} cases could be read")
        chosen = min(seen.values, key=lambda case: (self._sign * seen.values[case], case))
        return {
            "id": chosen,
            "strategy_used": self._name,
            "reason": f"{self._words} of {len(seen.values)} drawn from {len(ids)} open cases",
            self._figure: round(seen.values[chosen], 4),
            "scored": len(seen.values),
            "unreadable": seen.unreadable,
            **judge.facts,
        }
