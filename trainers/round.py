"""One round of a trainer while it runs: what was asked for, how far it is, and where a killed one goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.basis import Parts
from trainers.checkpoint import Checkpoint
from trainers.data import Case, Datastore
from trainers.loop import Progress, Run, Settings, Step, train
from trainers.rounds import Rounds
from trainers.tracking import Tracker

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 2.0
#: Between two states of the loop that are kept, at least.
KEEP_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a request asks for.

    Args:
        settings: Of the loop.
        batch: Slices per step.
        warm: Whether to start from the served weights, where they fit.
        tracker: One of `trainers.tracking.TRACKERS`.
        options: The trainer's own settings.
    """

    settings: Settings
    batch: int
    warm: bool
    tracker: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Round:
    """One round while it runs.

    Args:
        index: From 1, counted over all trainers of the same served weights.
        plan: What was asked for.
        parts: The cases.
        datastore: Where they are, and where proposals are kept.
        work: A folder for what a killed round goes on from; gone when the round is done.
        key: What the round depends on; whatever is kept in ``work`` belongs to it.
        rounds: Told how the round is doing.
        tracker: Takes figures.
    """

    index: int
    plan: Plan
    parts: Parts
    datastore: Datastore
    work: Path
    key: str
    rounds: Rounds
    tracker: Tracker
    _told: float = 0.0
    _steps: int = 0

    def tell(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        """Say how far a stage is: ``done`` of ``total`` epochs or cases."""
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS and 0 < done < total:
            return
        self._told = now
        shown = None if loss is None else round(loss, 4)
        progress = {
            "running": self.index,
            "stage": stage,
            "epoch": done,
            "total_epochs": total,
            "loss": shown,
        }
        self.rounds.tell(progress)
        logger.info(
            "round %d, %s: %d/%d%s", self.index, stage, done, total, f" loss {shown}" if shown else ""
        )

    def counted(self, stage: str, cases: Sequence[Case]) -> Iterator[Case]:
        """The cases one by one, telling how far a stage is."""
        for done, case in enumerate(cases):
            self.tell(stage, done, len(cases))
            yield case

    def train(self, stage: str, network: Any, step: Step, settings: Settings | None = None) -> Run:
        """Run the loop, going on where a killed run of the same round was.

        Args:
            stage: Its name; one for each call.
            network: Untrained or warm.
            step: See `trainers.loop.train`.
            settings: Others than the plan's.
        """

        def on_epoch(now: Progress) -> None:
            self._steps += 1
            self.tracker.figures({f"{stage}/loss": now.loss}, self._steps)
            self.tell(stage, now.epoch, now.epochs, now.loss)

        settings = settings or self.plan.settings
        self.tell(stage, 0, settings.epochs)
        path = self.work / f"{stage}.pt"
        checkpoint = Checkpoint(path=path, key=f"{self.key}/{stage}", every=KEEP_SECONDS)
        return train(network, step, settings, on_epoch=on_epoch, checkpoint=checkpoint)
