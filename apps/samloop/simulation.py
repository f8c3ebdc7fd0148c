"""The loop of a simulation: case after case, a training after every N of them, and the report."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apps.samloop import cases, report
from apps.samloop.casework import CaseWork
from apps.samloop.client import Client, ServerError
from sam_infer.errors import InputError

_REPEATS = 25
#: The model that most trainers train.
_TRAINED = "unet"
#: A model that answers with what a trainer of the same name stored, and only for cases that have it.
_STORED = "pseudo_label"
_ENDED = ("DONE", "ERROR", "STOPPED")
NOTES = [
    "clicks: all labels of a case together; undone clicks count, a box counts 2",
    "budget: for each label of a case",
    "proposal_dice: before any click, mean over the labels; null where there was no proposal",
    "final_dice: of the clinician's mask, as it is after the last click that was kept",
    "accept = truth: the stored mask is the true one; finishing by hand is not counted as clicks",
    "a label that the model proposes and the truth of the case lacks is deleted, which is not counted",
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a simulation is run; see the command line's help for each."""

    server: str
    truth: str
    label: str | None = None
    budget: int = 10
    accept_dice: float = 0.9
    retrain_every: int = 0
    trainer: str = "unet"
    train_params: Mapping[str, Any] = field(default_factory=dict)
    train_timeout: float = 7200.0
    strategy: str = "random"
    seed: int = 0
    max_cases: int | None = None
    first_prompt: str = "click"
    accept: str = "mask"
    proposal_model: str | None = None
    proposal_params: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    poll_seconds: float = 0.5

    def __post_init__(self) -> None:
        for name in ("budget", "retrain_every"):
            if getattr(self, name) < 0:
                raise InputError(name, getattr(self, name), "must be 0 or more")
        if not 0 < self.accept_dice <= 1:
            raise InputError("accept_dice", self.accept_dice, "must be above 0 and at most 1")
        if self.max_cases is not None and self.max_cases < 1:
            raise InputError("max_cases", self.max_cases, "must be 1 or more")
        if self.first_prompt not in ("click", "box"):
            raise InputError("first_prompt", self.first_prompt, "must be click or box")
        if self.accept not in ("mask", "truth"):
            raise InputError("accept", self.accept, "must be mask or truth")


class Simulation:
    """The loop: next case, clicks, acceptance, training.

    Args:
        settings: How it is run.
        out: JSON file of the report, or None.
        progress: Show a bar and a line for each round.
    """

    def __init__(self, settings: Settings, out: Path | None, progress: bool) -> None:
        self.settings, self.out, self.progress = settings, out, progress
        if out is not None and out.suffix == ".png":
            raise InputError("out", str(out), "name a .json file; the figure beside it ends in .png")
        self.truths = cases.truth_files(Path(settings.truth))
        self.client = Client(settings.server, client_id=f"simulate-{settings.seed}", timeout=settings.timeout)
        self.ended, self.round = "stopped", 1
        self.cases: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.trainings: dict[int, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """The whole loop; the report is written however it ends."""
        info = self.client.info()
        self.proposal_model = self._proposal_model(info)
        work = self._prepare(info)
        self.models = info.get("models", {})
        stopped: str | None = "interrupted"
        try:
            with tqdm(total=self._total(info), unit="case", disable=not self.progress) as bar:
                self._loop(work, bar)
            stopped = None
        except Exception as error:
            stopped = str(error)
            raise
        finally:
            done = self._report(complete=stopped is None, stopped=stopped)
            self._write(done)
            if self.out is not None and self.cases:
                report.plot_reports({self.out.stem: done}, self.out.with_suffix(".png"))
        return done

    def _loop(self, work: CaseWork, bar: tqdm) -> None:
        limit = self.settings.max_cases
        every = self.settings.retrain_every
        open_round = False
        while limit is None or len(self.cases) < limit:
            sample = self._next_sample()
            if sample is None:
                break
            image_id = str(sample["id"])
            try:
                record = work.run(image_id, propose=self.proposal_model in self.models)
            except cases.CaseError as error:
                self.skipped.append({"id": image_id, "reason": str(error)})
                continue
            chosen: dict[str, Any] = {k: sample[k] for k in ("strategy_used", "reason") if k in sample}
            self.cases.append({"round": self.round, **record, **chosen})
            bar.update()
            open_round = True
            self._write(self._report(complete=False, stopped=None))
            if every and len(self.cases) % every == 0:
                self.trainings[self.round] = self._retrain()
                self._say(bar)
                self.round += 1
                open_round = False
        else:
            self.ended = "max_cases"
        if open_round:
            self._say(bar)

    def _next_sample(self) -> dict[str, Any] | None:
        """The next case that was neither done nor skipped; None where there is no other.

        A case that had to be skipped stays open on the server, so a strategy may name it again; then a
        random one is asked for. Each request has a seed of its own: with one seed for all, a server that
        draws from fewer and fewer sorted cases would name neighbours.
        """
        seen = {c["id"] for c in self.cases} | {c["id"] for c in self.skipped}
        strategy = self.settings.strategy
        for repeat in range(_REPEATS + 10 * len(self.skipped)):
            seed = zlib.crc32(f"{self.settings.seed} {len(seen)} {repeat}".encode())
            sample = self.client.next_sample(strategy, seed=seed)
            if not sample.get("id"):
                self.ended = "no case left"
                return None
            if str(sample["id"]) not in seen:
                return sample
            if "random" in self.strategies:
                strategy = "random"
        self.ended = "only cases left that were done or skipped before"
        return None

    def _retrain(self) -> dict[str, Any]:
        """Start a training, wait for its end, and record what the server says about it.

        The figures are taken from the server's statistics only where the training is done and they are of a
        round that was not there before.
        """
        settings = self.settings
        before = self._stats(self.client.info()).get("round")
        begin = time.perf_counter()
        record: dict[str, Any] = {"trainer": settings.trainer, "status": "NOT TRAINED"}
        try:
            task = self.client.train(settings.trainer, dict(settings.train_params))
        except ServerError as error:
            if not error.refused:
                raise
            return {**record, "reason": error.detail, "seconds": 0.0}
        while task.get("status") not in _ENDED:
            if time.perf_counter() - begin > settings.train_timeout:
                return {
                    **record,
                    "status": "TIMEOUT",
                    "reason": f"not ended after {settings.train_timeout:.0f} s",
                    "seconds": round(time.perf_counter() - begin, 1),
                }
            time.sleep(settings.poll_seconds)
            task = self.client.train_status()
        info = self.client.info()
        self.models = info.get("models", {})
        record.update(status=task["status"], seconds=round(time.perf_counter() - begin, 1))
        stats = self._stats(info)
        if task["status"] != "DONE":
            record["reason"] = f"{task['status']}: {' | '.join(list(task.get('details') or [])[-3:])}"
        elif stats.get("round") == before:
            record["reason"] = f"the server has no outcome of it; its last round is {before}"
        else:
            figures = {name: stats.get(name) for name in ("published", "candidate_dice", "champion_dice")}
            record.update(figures, stats=stats)
        return record

    def _stats(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """What the server says about the trainer's last finished round; empty where there is none."""
        return dict((info.get("train_stats") or {}).get(self.settings.trainer) or {})

    def _proposal_model(self, info: Mapping[str, Any]) -> str:
        """What proposes: the model that is named, else the trainer's own, else the one that most train."""
        settings = self.settings
        own = settings.trainer in info.get("models", {}) and settings.trainer != _STORED
        return settings.proposal_model or (settings.trainer if own else _TRAINED)

    def _prepare(self, info: dict[str, Any]) -> CaseWork:
        """Refuse names that the server does not know, before anything is stored."""
        settings = self.settings
        known = cases.label_indices(info.get("labels"))
        self.strategies = list(info.get("strategies", {}))
        models, trainers = list(info.get("models", {})), list(info.get("trainers", {}))
        asked = [("strategy", settings.strategy, self.strategies)]
        if settings.label is not None:
            asked.append(("label", settings.label, list(known)))
        if settings.proposal_model:
            asked.append(("proposal_model", settings.proposal_model, models))
        if settings.retrain_every:
            asked.append(("trainer", settings.trainer, trainers))
        for argument, value, choices in asked:
            if value not in choices:
                raise InputError(argument, value, f"this server has {', '.join(choices) or 'none'}")
        return CaseWork(
            client=self.client,
            truths=self.truths,
            labels=known if settings.label is None else {settings.label: known[settings.label]},
            all_labels=known,
            proposal_model=self.proposal_model,
            proposal_params=settings.proposal_params,
            budget=settings.budget,
            accept_dice=settings.accept_dice,
            box_first=settings.first_prompt == "box",
            store_truth=settings.accept == "truth",
        )

    def _total(self, info: dict[str, Any]) -> int | None:
        store = info.get("datastore") or {}
        left = store.get("total", 0) - store.get("completed", 0)
        return min([v for v in (left, self.settings.max_cases) if v], default=None)

    def _say(self, bar: tqdm) -> None:
        if self.progress:
            rounds = report.summarise(self.cases, self.trainings)
            bar.write(report.round_line(rounds[-1]), file=sys.stdout)

    def _report(self, *, complete: bool, stopped: str | None) -> dict[str, Any]:
        return {
            "complete": complete,
            "stopped": stopped,
            "ended": self.ended,
            "clicks_per_case": report.mean([c["clicks"] for c in self.cases]),
            "final_dice": report.mean([c["final_dice"] for c in self.cases]),
            "proposal_dice": report.mean([c["proposal_dice"] for c in self.cases]),
            "below_threshold": sum(c["below_threshold"] for c in self.cases),
            "first_prompt": self.settings.first_prompt,
            "accept": self.settings.accept,
            "proposal_model": self.proposal_model,
            "rounds": report.summarise(self.cases, self.trainings),
            "cases": list(self.cases),
            "skipped": list(self.skipped),
            "settings": asdict(self.settings),
            "notes": NOTES,
        }

    def _write(self, done: dict[str, Any]) -> None:
        if self.out is not None:
            report.write_json(done, self.out)
