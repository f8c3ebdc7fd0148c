"""Latencies of a request, by stage."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds by stage, each from the end of the stage before it."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.stages: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + now - self._last, 4)
        self._last = now

    def total(self) -> dict[str, float]:
        """The stages, and ``total``."""
        return {**self.stages, "total": round(time.perf_counter() - self._start, 4)}
