"""The publish gate: new weights are served only where they beat the served ones on the same held-out cases.

Every decision is a line in a ledger, written before it is carried out: nothing is served without a record.
The line in force is the last one, of a publication or a rollback, whose ``candidate_sha256`` is that of the
served file; a crash between the line and the swap leaves a line that is not in force. Replaced weights stay
in a history folder.

A rollback takes a publication back: the weights that the served ones replaced serve again; where none are
kept nothing does. Its line has ``decision`` = "rolled back", what serves from then on as
``candidate_sha256`` (None for nothing), what was taken back as ``champion_sha256``, and no figures: it is no
round of training. What was taken back is kept in a folder of its own, so that it is not rolled back to. The
next training is judged against what serves then.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_infer.errors import InputError
from sam_infer.files import copy_atomic, sha256_of, sync
from trainers.evaluate import Score
from trainers.rounds import Rounds

#: Replaced weights that are kept, and as many that were taken back.
KEEP = 5
#: The decision of a rollback's line.
ROLLED_BACK = "rolled back"
_LEDGER = "-ledger.jsonl"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a candidate is published, and why.

    Args:
        publish: True where it is.
        reason: One sentence for people.
    """

    publish: bool
    reason: str


def decide(candidate: Score, champion: Score | None) -> Decision:
    """Compare a candidate with the model that is served.

    Args:
        candidate: On the held-out cases.
        champion: On the same cases; None where nothing comparable is served.

    Raises:
        ValueError: When the two were judged on different cases.
    """
    new, metric = candidate.value, candidate.metric.replace("_", " ").capitalize()
    if math.isnan(new):
        return Decision(publish=False, reason=f"{candidate.unjudged}, so nothing can be judged")
    if champion is None:
        if new <= candidate.nothing:
            return Decision(
                publish=False,
                reason=f"the candidate finds nothing on the held-out cases ({metric} {new:.3g})",
            )
        return Decision(publish=True, reason=f"first model for these labels, {metric} {new:.3f}")
    if (candidate.metric, set(candidate.cases)) != (champion.metric, set(champion.cases)):
        raise ValueError("candidate and champion must be evaluated on the same held-out cases")
    old = champion.value
    if math.isnan(old) or new > old:
        return Decision(
            publish=True, reason=f"better than the served model: {metric} {new:.3f} against {old:.3f}"
        )
    return Decision(
        publish=False, reason=f"not better than the served model: {metric} {new:.3f} against {old:.3f}"
    )


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Puts weights in service, keeps what they replace, and keeps the ledger.

    Args:
        served: The weights file that is served.
        keep: Number of replaced files that are kept, and of files that were taken back.
    """

    served: Path
    keep: int = KEEP

    @property
    def history(self) -> Path:
        """The folder of replaced weights, oldest name first."""
        return self.served.parent / f"{self.served.stem}-history"

    @property
    def taken_back(self) -> Path:
        """The folder of weights that rollbacks took out of service, oldest name first."""
        return self.served.parent / f"{self.served.stem}-taken-back"

    @property
    def ledger(self) -> Path:
        """The JSON-lines file of all decisions."""
        return self.served.parent / f"{self.served.stem}{_LEDGER}"

    def publish(
        self,
        candidate: Path,
        *,
        candidate_score: Score,
        champion_score: Score | None,
        record: Mapping[str, Any],
    ) -> Decision:
        """Decide, write the ledger, and replace the served file where the candidate is better.

        Args:
            candidate: The candidate's weights file, on the same file system; gone afterwards.
            candidate_score: On the held-out cases.
            champion_score: Of the served file on the same cases; None where it cannot be compared.
            record: What else goes into the ledger: case ids, seed, counts.
        """
        decision = decide(candidate_score, champion_score)
        line = {
            **record,
            "decision": "published" if decision.publish else "refused",
            "reason": decision.reason,
            "candidate": candidate_score.record(),
            "champion": champion_score.record() if champion_score else None,
            "candidate_sha256": sha256_of(candidate),
            "champion_sha256": sha256_of(self.served),
        }
        self._append(line)
        if decision.publish:
            self._replace(candidate)
        else:
            candidate.unlink()
        return decision

    def rollback(self, *, who: str = "") -> dict[str, Any]:
        """Put the weights back in service that the served ones replaced; where there are none, serve nothing.

        It is refused while a training runs, which is judged against what serves and may have started from it.

        Args:
            who: Did it, for the ledger.

        Returns:
            sha256 (of what serves now; None = nothing), round (its own), reason (one sentence), and
            taken_back (sha256 and round of what does not serve any more).

        Raises:
            InputError: (409) When nothing is served, or a training is running.
        """
        name = self.served.stem
        with Rounds(self.served.parent, name).one():
            served = sha256_of(self.served)
            if served is None:
                remedy = "no trained model is served, so there is nothing to take back; train one"
                raise InputError("model", name, remedy, status=409)
            former, copies = self._former(served)
            for copy in copies:
                copy.unlink()
            restored = former[-1] if former else None
            sha256 = sha256_of(restored) if restored else None
            now, before = self._round_of(sha256), self._round_of(served)
            found = f"{_named(sha256, now)} serves again" if sha256 else "nothing that was trained serves now"
            reason = f"{found}; {_named(served, before)} was taken back"
            line = {
                "decision": ROLLED_BACK,
                "reason": reason,
                "who": who,
                "round": now,
                "candidate_sha256": sha256,
                "champion_sha256": served,
            }
            self._append(line)
            self._put_back(restored)
        return {
            "sha256": sha256,
            "round": now,
            "reason": reason,
            "taken_back": {"sha256": served, "round": before},
        }

    def lines(self) -> list[dict[str, Any]]:
        """All lines of the ledger; a line that a crash cut short is left out."""
        lines = []
        if self.ledger.is_file():
            for text in self.ledger.read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
        return lines

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of trainings."""
        return [line for line in self.lines() if line["decision"] != ROLLED_BACK]

    def in_force(self) -> dict[str, Any] | None:
        """The line of what serves now, or of why nothing does; None where nothing ever did."""
        return self._in_force(sha256_of(self.served))

    def state(self) -> dict[str, Any]:
        """What serves now, for people.

        Returns:
            sha256 (None = nothing), round, and decision, reason and time of the line in force, each None
            where it is not known; history, the number of files that rollbacks can go back to.
        """
        sha256 = sha256_of(self.served)
        line = self._in_force(sha256) or {}
        told = {key: line.get(key) for key in ("round", "decision", "reason", "time")}
        return {"sha256": sha256, **told, "history": len(self._former(sha256)[0]) if sha256 else 0}

    def _replace(self, candidate: Path) -> None:
        if self.served.is_file():
            copy_atomic(self.served, self._place(self.history))
        self.served.parent.mkdir(parents=True, exist_ok=True)
        sync(candidate)
        candidate.replace(self.served)
        sync(self.served.parent)
        self._prune(self.history)

    def _put_back(self, restored: Path | None) -> None:
        """Serve a file of the history, or nothing, by one rename; what was served is kept."""
        place = self._place(self.taken_back)
        if restored is None:
            self.served.replace(place)
            sync(self.taken_back)
        else:
            copy_atomic(self.served, place)
            restored.replace(self.served)
            sync(self.history)
        sync(self.served.parent)
        self._prune(self.taken_back)

    def _place(self, folder: Path) -> Path:
        """Where the served file is kept in a folder: by time, and by what it is."""
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{time.time_ns():020d}-{str(sha256_of(self.served))[:16]}{self.served.suffix}"

    def _kept(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"[0-9]*{self.served.suffix}"))

    def _prune(self, folder: Path) -> None:
        for old in self._kept(folder)[: -self.keep]:
            old.unlink(missing_ok=True)

    def _former(self, served: str) -> tuple[list[Path], list[Path]]:
        """The history before the served file, oldest first, and the newer copies of that file itself.

        A publication that was cut short before its swap leaves such a copy.
        """
        former, copies = self._kept(self.history), []
        while former and former[-1].stem.endswith(served[:16]):
            copies.append(former.pop())
        return former, copies

    def _in_force(self, sha256: str | None) -> dict[str, Any] | None:
        lines = [line for line in self.lines() if line["decision"] != "refused"]
        return next((line for line in reversed(lines) if line["candidate_sha256"] == sha256), None)

    def _round_of(self, sha256: str | None) -> int | None:
        """The round that published a file; None where no line tells."""
        lines = [line for line in self.rounds() if line["decision"] == "published"]
        found = [line.get("round") for line in lines if line["candidate_sha256"] == sha256]
        return found[-1] if found else None

    def _append(self, line: Mapping[str, Any]) -> None:
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        stamped = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **line}
        with self.ledger.open("ab+") as file:
            torn = False
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(stamped).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def publishers(folder: Path) -> dict[str, Publisher]:
    """What was ever published, or refused, into a folder: model name to its publisher, by name."""
    names = sorted(path.name.removesuffix(_LEDGER) for path in folder.glob(f"[!.]*{_LEDGER}"))
    return {name: Publisher(served=folder / f"{name}.safetensors") for name in names}


def publisher_of(folder: Path, name: str) -> Publisher:
    """The publisher of a model by name.

    Raises:
        InputError: (404) When no training ever brought such a model.
    """
    known = publishers(folder)
    if name not in known:
        remedy = f"choose one of {', '.join(known)}" if known else "no model has been trained here yet"
        raise InputError("model", name, remedy, status=404)
    return known[name]


def _named(sha256: str, round_: int | None) -> str:
    return f"a model of unknown round ({sha256[:12]})" if round_ is None else f"round {round_}"
