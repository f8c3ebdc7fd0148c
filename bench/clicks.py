"""What a person who clicks waits for, measured over HTTP from the click to the last byte of the mask."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import requests

from bench.proc import peak_memory, resident_memory
from bench.servers import Server

TIMEOUT = 1800.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to a server.

    Args:
        image: Image id of a volume in its datastore.
        shape: (I, J, K) of the volume in voxels.
        model: The click task.
        volume_model: The task that carries a click through the volume; None = not measured.
        clicks: Clicks of each kind.
        users: Users at once, each on a slice of their own: a first click on it, then another.
        compress: Whether masks are asked for with gzip.
    """

    image: str
    shape: tuple[int, int, int]
    model: str
    volume_model: str | None
    clicks: int
    users: int
    compress: bool


@dataclass
class Waits:
    """Seconds waited, by kind, and memory in bytes."""

    opened: float = 0.0
    new_slice: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    volume: list[float] = field(default_factory=list)
    crowd: list[float] = field(default_factory=list)
    info: list[float] = field(default_factory=list)
    memory: int = 0
    peak_memory: int = 0


def measure(server: Server, plan: Plan, seed: int = 0) -> Waits:
    """Click as planned.

    Every click of a kind has a point of its own, so that no answer is known already. Slices are those of the
    middle half of the volume, a fresh one for each first click.
    """
    rng = np.random.default_rng(seed)
    needed = 1 + plan.clicks + plan.users + (1 + min(3, plan.clicks) if plan.volume_model else 0)
    middle = np.arange(plan.shape[2] // 4, plan.shape[2] - plan.shape[2] // 4)
    if needed > len(middle):
        raise ValueError(f"{len(middle)} slices are too few for {needed} slices to click on")
    slices = iter(rng.permutation(middle).tolist())
    person = Clicker(server.url, plan)

    def point(k: int) -> list[int]:
        return [*(int(rng.integers(n * 3 // 8, n * 5 // 8)) for n in plan.shape[:2]), k]

    waits = Waits()
    waits.opened = person.click(plan.model, point(next(slices)))
    for _ in range(plan.clicks):
        waits.new_slice.append(person.click(plan.model, point(k := next(slices))))
    for _ in range(plan.clicks):
        waits.repeated.append(person.click(plan.model, point(k)))
    if plan.volume_model is not None:
        person.click(plan.volume_model, point(next(slices)))
        for _ in range(min(3, plan.clicks)):
            waits.volume.append(person.click(plan.volume_model, point(next(slices))))
    errands = [[point(k := next(slices)), point(k)] for _ in range(plan.users)]
    waits.crowd, waits.info = _crowd(server.url, plan, errands)
    waits.memory, waits.peak_memory = resident_memory(server.pid), peak_memory(server.pid)
    return waits


class Clicker:
    """One person at a viewer."""

    def __init__(self, url: str, plan: Plan) -> None:
        self._url = url
        self._plan = plan
        self._http = requests.Session()

    def click(self, model: str, point: list[int]) -> float:
        """Seconds until the whole mask has arrived.

        Raises:
            RuntimeError: When the answer holds none.
        """
        params = {
            "foreground": [point],
            "background": [],
            "result_extension": ".nrrd",
            "result_dtype": "uint8",
            "result_compress": self._plan.compress,
            "device": "cpu",
        }
        start = time.perf_counter()
        answer = self._http.post(
            f"{self._url}/infer/{model}",
            params={"image": self._plan.image, "output": "image"},
            data={"params": json.dumps(params)},
            timeout=TIMEOUT,
        )
        seconds = time.perf_counter() - start
        if not answer.ok or not answer.content.startswith(b"NRRD"):
            raise RuntimeError(f"{model} answered {answer.status_code}: {answer.content[:300]!r}")
        return seconds


def _crowd(url: str, plan: Plan, errands: Iterable[list[list[int]]]) -> tuple[list[float], list[float]]:
    """Seconds of each click where all click at once, and of /info/ meanwhile."""
    clicks: list[float] = []
    failures: list[Exception] = []

    def user(points: list[list[int]]) -> None:
        person = Clicker(url, plan)
        try:
            for point in points:
                clicks.append(person.click(plan.model, point))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=user, args=(points,)) for points in errands]
    for thread in threads:
        thread.start()
    polls: list[float] = []
    with requests.Session() as http:
        while not polls or any(thread.is_alive() for thread in threads):
            start = time.perf_counter()
            http.get(f"{url}/info/", timeout=TIMEOUT).raise_for_status()
            polls.append(time.perf_counter() - start)
            time.sleep(0.05)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return clicks, polls


def summary(waits: Waits) -> dict[str, Any]:
    """p50, p95 and count of each kind, in seconds; single figures as they are."""
    out: dict[str, Any] = {}
    for kind, value in vars(waits).items():
        if not isinstance(value, list):
            out[kind] = value
        elif value:
            p50, p95 = np.percentile(value, [50, 95])
            out[kind] = {"p50": p50, "p95": p95, "max": max(value), "n": len(value)}
        else:
            out[kind] = None
    return out
