"""The rounds of trainers: one at a time, across processes, and what viewers are told about them.

Files in the folder of the weights: ``training.lock`` is held by the process that runs a round of any trainer,
and the system frees it however that process ends; ``training-progress.json`` is there while a round runs;
``NAME-stats.json`` is the outcome of a trainer's last finished round, replaced by its next outcome only.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sam_infer.errors import InputError
from sam_infer.files import write_atomic

#: A reader that finds out whether a round still runs may hold the lock for a moment; a round holds it longer.
PATIENCE_SECONDS = 1.0


class Rounds:
    """Runs one round at a time and keeps its record. Safe to use from several threads and processes.

    Args:
        folder: Of the weights, shared by all trainers; made where it is missing.
        name: Of the trainer.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.outcome_path = folder / f"{name}-stats.json"
        self.progress_path = folder / "training-progress.json"
        self._lock_path = folder / "training.lock"
        self._read: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._mutex = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold the lock during a round; its progress is gone afterwards.

        Raises:
            InputError: (409) When a round runs already.
        """
        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock_path)
        try:
            lock.acquire(timeout=PATIENCE_SECONDS)
        except Timeout:
            remedy = "a training is running; wait for its end, or stop it"
            raise InputError("model", self.name, remedy, status=409) from None
        try:
            self.progress_path.unlink(missing_ok=True)  # of a process that was killed
            yield
        finally:
            self.progress_path.unlink(missing_ok=True)
            lock.release()

    def tell(self, progress: Mapping[str, Any]) -> None:
        """Record how the round that runs is doing."""
        write_atomic(self.progress_path, json.dumps({"trainer": self.name, **progress}).encode())

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Record what a round came to."""
        write_atomic(self.outcome_path, json.dumps(dict(outcome)).encode())

    def stats(self) -> dict[str, Any]:
        """The last outcome and, while a round runs, its progress over it, without the outcome's total_time.

        The absence of ``total_time`` is how 3D Slicer knows that a training runs. A file is read anew only
        when it changed.
        """
        with self._mutex:
            progress = self._content(self.progress_path)
            running = progress.pop("trainer", None) == self.name and self._running()
            outcome = self._content(self.outcome_path)
        if not running:
            return outcome
        outcome.pop("total_time", None)
        return {**outcome, **progress}

    def _running(self) -> bool:
        """Whether the lock is held; the progress that a killed process left is removed."""
        try:
            with FileLock(self._lock_path, timeout=0):
                self.progress_path.unlink(missing_ok=True)
        except Timeout:
            return True
        return False

    def _content(self, path: Path) -> dict[str, Any]:
        try:
            stat = path.stat()
            key = (stat.st_mtime_ns, stat.st_size)
            if path not in self._read or self._read[path][0] != key:
                self._read[path] = (key, json.loads(path.read_bytes()))
        except FileNotFoundError:
            return {}
        return dict(self._read[path][1])
