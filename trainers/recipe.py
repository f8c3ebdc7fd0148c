"""What all trainers have in common: settings in, a round run alone and resumable, statistics out."""

from __future__ import annotations

import datetime
import hashlib
import logging
import shutil
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.train import TrainTask

from sam_infer.errors import InputError
from sam_infer.files import write_atomic
from sam_infer.volumes import file_key
from trainers.basis import Basis, Parts
from trainers.data import Case, Datastore
from trainers.gate import Publisher
from trainers.loop import PRECISIONS, Settings
from trainers.options import choice, devices, flag, number
from trainers.round import Plan, Round
from trainers.rounds import Rounds
from trainers.tracking import TRACKERS, tracking

logger = logging.getLogger(__name__)


class Recipe(TrainTask):
    """A trainer. Each brings what is trained and how it is judged.

    Args:
        basis: What it stands on.
        name: Of the trainer, as in POST /train/{name}.
        served: Name of the weights that it publishes: "unet", or another for another kind of model.
        description: For people.
    """

    def __init__(self, basis: Basis, *, name: str, served: str, description: str) -> None:
        super().__init__(description)
        self.basis = basis
        self.name = name
        self.publisher = Publisher(served=basis.model_dir / f"{served}.safetensors")
        self.rounds = Rounds(basis.model_dir, name)

    @property
    def path(self) -> Path:
        """The weights file that is served."""
        return self.publisher.served

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {
            "iterations": self.basis.iterations,
            "max_minutes": 10,
            "learning_rate": 0.003,
            "batch_size": 8,
            "seed": 0,
            "device": devices(),
            "precision": list(PRECISIONS),
            "tracking": list(TRACKERS),
        }

    def stats(self) -> dict[str, Any]:
        """The outcome of the last finished round, kept until the next one is there.

        While a round runs, ``running`` is its number and ``stage``, ``epoch``, ``total_epochs`` and ``loss``
        are its own; everything else, ``round`` and ``published`` for instance, is still of the finished one.
        """
        return self.rounds.stats()

    def split(self, datastore: Datastore) -> Parts:
        """The cases, divided into those trained on, those held out, and those without a label."""
        return self.basis.split(datastore)

    def precheck(self, datastore: Datastore) -> None:
        """Whether there is enough to train on.

        Raises:
            InputError: (409) With what is missing and which cases to accept next.
        """
        parts = self.split(datastore)
        missing = self._missing(parts)
        if not parts.held_out:
            names = [n for n in sorted(datastore.get_unlabeled_images()) if self.basis.is_held_out(n)]
            missing.append("at least 1 held-out case" + for_instance(names))
        if missing:
            raise InputError(
                "accepted cases",
                len(parts.training) + len(parts.held_out),
                f"{len(parts.training)} of them for training and {len(parts.held_out)} held out to judge the "
                f"result; needed: {' and '.join(missing)}. Accept more cases, then train again",
                status=409,
            )

    def check(self, request: Mapping[str, Any]) -> None:
        """Whether the settings of a request can be used; keys that are not in `config` are ignored.

        Raises:
            InputError: With the first setting that cannot.
        """
        self._plan(request)

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, judge, publish or refuse.

        Args:
            request: See `config`.
            datastore: Its accepted (final) labels are used.

        Returns:
            The statistics of the round, see `stats`.

        Raises:
            InputError: When a setting is wrong, there is too little to train on, or a training runs already.
        """
        import torch

        plan = self._plan(request)
        self.precheck(datastore)
        with self.rounds.one():
            threads = torch.get_num_threads()
            torch.set_num_threads(self.basis.threads)
            try:
                return self._run(plan, datastore)
            finally:
                torch.set_num_threads(threads)

    def _run(self, plan: Plan, datastore: Datastore) -> dict[str, Any]:
        began, parts = time.monotonic(), self.split(datastore)
        key = self._key(plan, parts, datastore)
        work = self._work(key)
        index = 1 + len(self.publisher.rounds())
        run_name = f"{self.name}-{index}"
        with tracking(plan.tracker, self.basis.model_dir, name=run_name, settings=_flat(plan)) as tracker:
            now = Round(
                index=index,
                plan=plan,
                parts=parts,
                datastore=datastore,
                work=work,
                key=key,
                rounds=self.rounds,
                tracker=tracker,
            )
            stats = {"trainer": self.name, **self._round(now)}
            reached = {name: stats[name] for name in stats if name.startswith(("candidate_", "champion_"))}
            tracker.figures({n: v for n, v in reached.items() if isinstance(v, float)}, 1 + now._steps)
        stats["total_time"] = str(datetime.timedelta(seconds=round(time.monotonic() - began)))
        self.rounds.finish(stats)
        shutil.rmtree(work, ignore_errors=True)
        logger.info("round %d: %s; %s", index, stats["reason"], stats["total_time"])
        return stats

    @abstractmethod
    def _round(self, now: Round) -> dict[str, Any]:
        """Train, judge, publish or refuse; the outcome's figures, ``round`` and ``reason`` among them."""

    def _missing(self, parts: Parts) -> list[str]:
        """What is missing to train, beside a held-out case, in words."""
        if len(parts.training) >= self.basis.minimum:
            return []
        return [f"at least {self.basis.minimum} cases for training" + for_instance(parts.unlabelled)]

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The trainer's own settings of a request, checked."""
        return {}

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        """The cases on which a round depends."""
        return parts.training

    def _plan(self, request: Mapping[str, Any]) -> Plan:
        config = self.config()
        device = choice(request, "device", config["device"])
        iterations = int(number(request, "iterations", config["iterations"], low=1, high=1e6, whole=True))
        settings = Settings(
            iterations=iterations,
            max_seconds=60 * number(request, "max_minutes", config["max_minutes"], low=0.001, high=1e5),
            learning_rate=number(request, "learning_rate", config["learning_rate"], low=1e-7, high=1.0),
            seed=int(number(request, "seed", config["seed"], low=0, high=2**31, whole=True)),
            device=device,
            epochs=min(Settings.epochs, iterations),
            precision=choice(request, "precision", config["precision"]),
        )
        return Plan(
            settings=settings,
            batch=int(number(request, "batch_size", config["batch_size"], low=1, high=64, whole=True)),
            warm="warm_start" in config and flag(request, "warm_start", config["warm_start"]),
            tracker=choice(request, "tracking", config["tracking"]),
            options=self._options(request),
        )

    def _key(self, plan: Plan, parts: Parts, datastore: Datastore) -> str:
        """What a round depends on: a killed round goes on only where all of it is as it was."""
        cases = [
            (c.case_id, file_key(c.image), None if c.label is None else file_key(c.label), c.slices)
            for c in self._inputs(plan, parts, datastore)
        ]
        served = file_key(self.path) if plan.warm and self.path.is_file() else None
        basis = [getattr(self.basis, name) for name in ("labels", "size", "window", "augmentation")]
        return hashlib.sha256(repr((self.name, plan, basis, served, cases)).encode()).hexdigest()

    def _work(self, key: str) -> Path:
        """The folder of a killed round of the same key, or an empty one."""
        work = self.basis.model_dir / f"{self.name}-work"
        mark = work / "key"
        if not mark.is_file() or mark.read_text() != key:
            shutil.rmtree(work, ignore_errors=True)
            write_atomic(mark, key.encode())
        else:
            logger.info("going on with a training that was interrupted")
        return work


def for_instance(names: Sequence[str]) -> str:
    """Up to 3 of some names, in brackets, for a message; "" of none."""
    return f" (for instance {', '.join(names[:3])})" if names else ""


def _flat(plan: Plan) -> dict[str, Any]:
    return {**vars(plan.settings), "batch": plan.batch, "warm_start": plan.warm, **plan.options}
