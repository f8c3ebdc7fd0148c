"""A model run over many cases, one by one: resumed where it was, told as it goes, never stopped by one case.

The report is a JSON file, written after every case. It is also the memory of what was done: a case whose
result is still there is skipped where model, settings and image file are those of its entry. So a run that
was killed goes on when it is started again.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.samloop.proposals import StoredProposal
from sam_infer.errors import InputError, UnavailableError
from sam_infer.files import write_atomic
from sam_infer.tasks.reply import LabelmapTask
from sam_infer.volumes import file_key

logger = logging.getLogger(__name__)
AGAIN = "done before, with the same model, settings and file"
Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case of a batch.

    Args:
        name: Its id.
        find: Gives its image file; called when its turn comes, since a remote one is fetched then.
        kept: Whether the result that an earlier entry tells of is still there.
    """

    name: str
    find: Callable[[], Path]
    kept: Callable[[Entry], bool]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is run over the cases.

    Args:
        model: Name of the task.
        fingerprint: What its answers follow from: weights and engine (`LabelmapTask.fingerprint`).
        settings: What it is asked with, and where results go; JSON.
    """

    model: str
    fingerprint: str
    settings: Mapping[str, Any]

    def mark(self, path: Path) -> str:
        """What a result follows from: model, settings and the image file as it is now."""
        made = [self.model, self.fingerprint, self.settings, file_key(path)]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


#: Runs the model on a case's image and keeps the result: the reply's JSON, without its label map.
Work = Callable[[Case, Path, str], Mapping[str, Any]]


def runnable(infers: Mapping[str, LabelmapTask], name: str) -> LabelmapTask:
    """The task of a name, which must need no prompts.

    Raises:
        InputError: With the names of those that can be run over many cases.
    """
    names = [n for n, task in infers.items() if task.type == "segmentation"]
    names = [n for n in names if not isinstance(infers[n], StoredProposal)]
    if name not in names:
        can = f"choose one of {', '.join(names)}" if names else "this project serves none"
        raise InputError("model", name, f"only a model that needs no prompts runs by itself; {can}")
    return infers[name]


def read_report(path: Path) -> dict[str, Any] | None:
    """A report as it is now; None where there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("The report %s cannot be read, all cases are done anew: %s", path, error)
        return None
    return found if isinstance(found, dict) else None


def run_batch(
    cases: Sequence[Case],
    job: Job,
    work: Work,
    *,
    report: Path,
    restart: bool = False,
    tell: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a model over cases.

    Args:
        cases: In the order in which they are done; their names differ.
        job: What is run.
        work: Runs it on one case, given its file and the mark that the result is kept with; what it raises
            is the case's failure.
        report: The JSON file, see `Report`.
        restart: Do all cases, also those that were done before.
        tell: Called with the report after every case.

    Returns:
        The report.
    """
    state = Report(report, job, [case.name for case in cases])
    left = []
    for case in cases:
        before = None if restart else state.earlier.get(case.name)
        if before is not None and _still_holds(before, case, job):
            state.add(case.name, {**before, "status": "skipped", "reason": AGAIN})
        else:
            left.append(case)
    tell(state.write())
    for case in left:
        state.add(case.name, _run(case, job, work))
        tell(state.write())
    return state.write(ended=True)


class Report:
    """What was done, as JSON.

    ``model``, ``fingerprint``, ``settings``, ``started``, ``ended`` (null while it runs, and where it was
    killed), ``total``, ``done``, ``skipped``, ``failed``, ``left``, ``seconds_left``; ``cases``: by id,
    ``status`` (done, skipped or failed), ``reason``, ``seconds``, ``label_names``, ``score``, ``mark``;
    ``earlier``: the entries of former runs for cases that this one has not come to.
    """

    def __init__(self, path: Path, job: Job, names: Iterable[str]) -> None:
        old = read_report(path) or {}
        known = {**old.get("earlier", {}), **old.get("cases", {})}
        self.earlier: dict[str, Entry] = {n: e for n, e in known.items() if e.get("mark")}
        self._path = path
        self._job = job
        self._total = len(list(names))
        self._cases: dict[str, Entry] = {}
        self._began = time.monotonic()
        self._started = _now()

    def add(self, name: str, entry: Entry) -> None:
        """Tell what became of a case."""
        self._cases[name] = entry
        self.earlier.pop(name, None)

    def write(self, *, ended: bool = False) -> dict[str, Any]:
        """Write the file; returns its content."""
        counts = Counter(entry["status"] for entry in self._cases.values())
        left, worked = self._total - len(self._cases), counts["done"] + counts["failed"]
        each = (time.monotonic() - self._began) / worked if worked else None
        rest = round(each * left, 1) if each is not None else None
        content = {
            "model": self._job.model,
            "fingerprint": self._job.fingerprint,
            "settings": dict(self._job.settings),
            "started": self._started,
            "ended": _now() if ended else None,
            "total": self._total,
            **{status: counts[status] for status in ("done", "skipped", "failed")},
            "left": left,
            "seconds_left": rest if left else 0.0,
            "cases": self._cases,
            "earlier": self.earlier,
        }
        write_atomic(self._path, json.dumps(content).encode())
        return content


def _still_holds(before: Entry, case: Case, job: Job) -> bool:
    try:
        return case.kept(before) and before["mark"] == job.mark(case.find())
    except (InputError, UnavailableError, OSError):
        return False  # its turn comes, and tells what is wrong


def _run(case: Case, job: Job, work: Work) -> Entry:
    begin = time.monotonic()
    entry: Entry = {"status": "failed", "reason": None, "seconds": 0.0, "label_names": None, "score": None}
    try:
        path = case.find()
        mark = job.mark(path)
        params = work(case, path, mark)
        entry.update(
            status="done", label_names=params.get("label_names", {}), score=params.get("score"), mark=mark
        )
    except InputError as error:
        entry["reason"] = str(error)
    except Exception as error:
        logger.warning("%s failed", case.name, exc_info=error)
        entry["reason"] = f"{type(error).__name__}: {error}"
    entry["seconds"] = round(time.monotonic() - begin, 3)
    return entry


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
