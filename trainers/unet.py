"""The trainer behind ``POST /train/unet``: accepted cases in, better weights out, or a reason why not."""

from __future__ import annotations

import datetime
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.train import TrainTask

from sam_infer.errors import InputError
from sam_infer.networks.unet import (
    CHANNELS,
    SIZE,
    UnetModel,
    build_unet,
    check_size,
    load_unet,
    save_unet,
)
from sam_infer.volumes import read_image
from trainers.augment import Augmentation
from trainers.data import Case, Datastore, ReadImage, SliceStore, WindowFor, accepted_cases
from trainers.evaluate import Score, evaluate
from trainers.gate import Publisher
from trainers.loop import Progress, Run, Settings, supervised_step, train
from trainers.options import devices, first, flag, number
from trainers.rounds import Rounds
from trainers.split import is_held_out

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The accepted cases, divided.

    Args:
        training: Trained on.
        held_out: Never trained on.
    """

    training: list[Case]
    held_out: list[Case]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a request asks for.

    Args:
        settings: Of the loop.
        batch: Slices per step.
        warm: Whether to start from the served weights, where they fit.
    """

    settings: Settings
    batch: int
    warm: bool


class UnetTrainer(TrainTask):
    """Trains the U-Net on what was accepted and publishes it where it got better.

    Args:
        model_dir: Where the served weights, the ledger, the history, the statistics and prepared slices lie.
        labels: Label name to value in the label maps, 1..254, gaps allowed.
        window_for: The window of an image for a request; the one that serving uses.
        window: The same policy in words and numbers, for the weights' record (`Project.window`).
        read: How an image file is read.
        size: Longest side in pixels of what the network sees; a multiple of 16.
        held_out: Share of the cases (or groups) that is never trained on.
        group: Regular expression for what must stay together in the split; see `trainers.split`.
        minimum: Training cases needed.
        augmentation: Random changes while training.
        iterations: Default number of optimiser steps.
        threads: CPU threads used while training; None = half of the cores, since the server computes on the
            same ones.
    """

    def __init__(
        self,
        *,
        model_dir: Path | str,
        labels: Mapping[str, int],
        window_for: WindowFor,
        window: Mapping[str, Any] | None = None,
        read: ReadImage = read_image,
        size: int = SIZE,
        held_out: float = 0.25,
        group: str | None = None,
        minimum: int = 3,
        augmentation: Augmentation | None = None,
        iterations: int = 400,
        threads: int | None = None,
    ) -> None:
        super().__init__("Trains the U-Net on the accepted cases; publishes it only where it got better")
        self.model_dir = Path(model_dir)
        self.labels = dict(labels)
        self.publisher = Publisher(served=self.model_dir / "unet.safetensors")
        self.rounds = Rounds(self.model_dir, "unet")
        self._window_for = window_for
        self._window = dict(window or {})
        self._read = read
        self._size = check_size(size)
        self._held_out = held_out
        self._group = group
        self._minimum = minimum
        self._augmentation = augmentation or Augmentation()
        self._iterations = iterations
        self._threads = threads or max(1, (os.cpu_count() or 2) // 2)

    @property
    def path(self) -> Path:
        """The weights file that is served."""
        return self.publisher.served

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {
            "iterations": self._iterations,
            "max_minutes": 10,
            "learning_rate": 0.003,
            "batch_size": 8,
            "seed": 0,
            "device": devices(),
            "warm_start": True,
        }

    def stats(self) -> dict[str, Any]:
        """The outcome of the last finished round, kept until the next one is there.

        While a round runs, ``running`` is its number and ``epoch``, ``total_epochs`` and ``loss`` are its
        own; everything else, ``round`` and ``published`` for instance, is still of the finished one.
        """
        return self.rounds.stats()

    def split(self, datastore: Datastore) -> Parts:
        """The accepted cases, divided into those trained on and those held out."""
        cases = accepted_cases(datastore)
        held = {c.case_id for c in cases if self._is_held_out(c.case_id)}
        return Parts(
            training=[c for c in cases if c.case_id not in held],
            held_out=[c for c in cases if c.case_id in held],
        )

    def precheck(self, datastore: Datastore) -> None:
        """Whether there is enough to train on.

        Raises:
            InputError: (409) With what is missing and which cases to accept next.
        """
        parts = self.split(datastore)
        missing = []
        if len(parts.training) < self._minimum:
            missing.append(
                f"at least {self._minimum} cases for training" + self._suggest(datastore, held=False)
            )
        if not parts.held_out:
            missing.append("at least 1 held-out case" + self._suggest(datastore, held=True))
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
            torch.set_num_threads(self._threads)
            try:
                return self._round(plan, self.split(datastore))
            finally:
                torch.set_num_threads(threads)

    def _round(self, plan: Plan, parts: Parts) -> dict[str, Any]:
        began, settings = time.monotonic(), plan.settings
        index = 1 + len(self.publisher.rounds())
        progress = {"running": index, "epoch": 0, "total_epochs": settings.epochs, "loss": None}
        self.rounds.tell(progress)
        logger.info("round %d: %d training cases, reading", index, len(parts.training))
        slices = self._slices().load_all(parts.training)
        champion = self._champion(settings.device)
        warm = plan.warm and champion is not None and champion.channels == CHANNELS
        network = self._network(champion if warm else None, settings.seed)
        told = [0.0]

        def on_epoch(now: Progress) -> None:
            if now.seconds - told[0] >= PROGRESS_SECONDS or now.epoch == now.epochs:
                told[0] = now.seconds
                self.rounds.tell({**progress, "epoch": now.epoch, "loss": round(now.loss, 4)})
                logger.info("epoch %d/%d loss %.3f (%.0f s)", now.epoch, now.epochs, now.loss, now.seconds)

        step = supervised_step(slices, classes=len(self.labels), batch=plan.batch, augment=self._augmentation)
        run = train(network, step, settings, on_epoch=on_epoch)
        training = {
            "round": index,
            "training_cases": len(parts.training),
            "held_out": len(parts.held_out),
            "slices": len(slices),
            "seed": settings.seed,
            "iterations": run.iterations,
            "warm_start": warm,
        }
        candidate = UnetModel(
            network=run.network, labels=self.labels, size=self._size, window=self._window, training=training
        )
        stats = {**training, "total_epochs": settings.epochs, **self._judge(candidate, champion, parts, run)}
        stats["total_time"] = str(datetime.timedelta(seconds=round(time.monotonic() - began)))
        self.rounds.finish(stats)
        logger.info("round %d: %s; %s", index, stats["reason"], stats["total_time"])
        return stats

    def _judge(
        self, candidate: UnetModel, champion: UnetModel | None, parts: Parts, run: Run
    ) -> dict[str, Any]:
        """Publish or refuse; the outcome's figures."""
        logger.info("judging on %d held-out cases", len(parts.held_out))
        new = self._score(candidate, parts)
        old = self._score(champion, parts) if champion else None
        path = self.model_dir / "unet-candidate.safetensors"
        save_unet(path, candidate)
        record = {
            **candidate.training,
            "training_ids": [c.case_id for c in parts.training],
            "held_out_ids": [c.case_id for c in parts.held_out],
            "seconds": round(run.seconds, 1),
            "stopped": run.stopped,
        }
        decision = self.publisher.publish(path, candidate_score=new, champion_score=old, record=record)
        served = new if decision.publish or old is None else old
        return {
            "epoch": len(run.losses),
            "loss": round(run.losses[-1], 4) if run.losses else None,
            "stopped": run.stopped,
            "published": decision.publish,
            "reason": decision.reason,
            "candidate_dice": new.record()["dice"],
            "champion_dice": old.record()["dice"] if old else None,
            "per_label": new.record()["per_label"],
            "best_metric": 0.0 if math.isnan(served.dice) else round(served.dice, 4),
        }

    def _score(self, model: UnetModel, parts: Parts) -> Score:
        return evaluate(model, parts.held_out, window_for=self._window_for, read=self._read)

    def _champion(self, device: str) -> UnetModel | None:
        """The served model, where it has the project's labels; else None."""
        if not self.path.is_file():
            return None
        try:
            model = load_unet(self.path, device=device)
        except ValueError as error:
            logger.warning("%s; training from scratch", error)
            return None
        if list(model.labels.items()) != list(self.labels.items()):  # their order is that of the channels
            logger.warning("the served model has labels %s; training from scratch", dict(model.labels))
            return None
        return model

    def _network(self, start: UnetModel | None, seed: int) -> Any:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_unet(labels=len(self.labels))
        if start is not None:
            network.load_state_dict(start.network.state_dict())
        return network

    def _slices(self) -> SliceStore:
        return SliceStore(
            folder=self.model_dir / "slices",
            labels=self.labels,
            size=self._size,
            window_for=self._window_for,
            window=self._window,
            read=self._read,
        )

    def _plan(self, request: Mapping[str, Any]) -> Plan:
        config = self.config()
        device = str(first(request.get("device", config["device"])))
        if device not in config["device"]:
            raise InputError("device", device, f"this machine has {', '.join(config['device'])}")
        iterations = int(number(request, "iterations", config["iterations"], low=1, high=1e6, whole=True))
        settings = Settings(
            iterations=iterations,
            max_seconds=60 * number(request, "max_minutes", config["max_minutes"], low=0.001, high=1e5),
            learning_rate=number(request, "learning_rate", config["learning_rate"], low=1e-7, high=1.0),
            seed=int(number(request, "seed", config["seed"], low=0, high=2**31, whole=True)),
            device=device,
            epochs=min(Settings.epochs, iterations),
        )
        return Plan(
            settings=settings,
            batch=int(number(request, "batch_size", config["batch_size"], low=1, high=64, whole=True)),
            warm=flag(request, "warm_start", config["warm_start"]),
        )

    def _is_held_out(self, case_id: str) -> bool:
        return is_held_out(case_id, fraction=self._held_out, group=self._group)

    def _suggest(self, datastore: Datastore, *, held: bool) -> str:
        """Names of up to 3 open cases that would fall into the part in need."""
        names = sorted(n for n in datastore.get_unlabeled_images() if self._is_held_out(n) == held)
        return f" (for instance {', '.join(names[:3])})" if names else ""
