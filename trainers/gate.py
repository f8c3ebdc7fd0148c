"""The publish gate: new weights are served only where they beat the served ones on the same held-out cases.

Every decision is a line in a ledger, written before it is carried out: nothing is served without a record.
The line in force is the last one whose ``candidate_sha256`` is that of the served file; a crash between the
line and the swap leaves a line that is not in force. Replaced weights stay in a history folder; copying one
of them over the served file takes a publication back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_infer.files import copy_atomic, sync
from trainers.evaluate import Score

#: Replaced weights that are kept.
KEEP = 5


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
        keep: Number of replaced files that are kept.
    """

    served: Path
    keep: int = KEEP

    @property
    def history(self) -> Path:
        """The folder of replaced weights, oldest name first."""
        return self.served.parent / f"{self.served.stem}-history"

    @property
    def ledger(self) -> Path:
        """The JSON-lines file of all decisions."""
        return self.served.parent / f"{self.served.stem}-ledger.jsonl"

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

    def rounds(self) -> list[dict[str, Any]]:
        """All lines of the ledger; a line that a crash cut short is left out."""
        lines = []
        if self.ledger.is_file():
            for text in self.ledger.read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
        return lines

    def _replace(self, candidate: Path) -> None:
        if self.served.is_file():
            self.history.mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns():020d}-{str(sha256_of(self.served))[:16]}{self.served.suffix}"
            copy_atomic(self.served, self.history / name)
        self.served.parent.mkdir(parents=True, exist_ok=True)
        sync(candidate)
        candidate.replace(self.served)
        sync(self.served.parent)
        for old in sorted(self.history.glob(f"[0-9]*{self.served.suffix}"))[: -self.keep]:
            old.unlink(missing_ok=True)

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


def sha256_of(path: Path) -> str | None:
    """Hex digest of a file's content; None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
