"""A working day in minutes: clients who click, save, train and download at once; how the server bears it.

python -m bench soak --out results --minutes 10

Each answer that is not what it should be is an error. Memory is watched from outside; its slope is fitted to
what follows the warm-up, the first fifth of the time.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests

from bench import servers
from bench.proc import cpu_name, peak_memory, resident_memory
from bench.table import markdown

TIMEOUT = 120.0
CASES = 12
SHAPE = (96, 96, 48)
#: Seconds between two looks at memory and `GET /info/`.
LOOK = 1.0
WARM_UP = 0.2
#: What clients do, and how often.
WEIGHTS = {
    "click 2D": 6, "click 3D": 4, "landmarks": 2, "automatic": 1, "save": 3, "next case": 2, "info": 2,
    "image": 1, "label": 1, "session": 1, "train": 1,
}  # fmt: skip


@dataclass
class Record:
    """What happened, by kind of request. Written by many threads, each entry by one append."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)


class Client:
    """A clinician who does one thing after the other.

    Args:
        url: The server.
        truth: Folder of label maps, by case.
        record: Where it is noted what happens.
        seed: Of what is done.
    """

    def __init__(self, *, url: str, truth: Path, record: Record, seed: int) -> None:
        self._url, self._truth, self._record = url, truth, record
        self._draw = random.Random(seed)
        self._session = requests.Session()
        self._acts: dict[str, Callable[[], None]] = {
            "click 2D": lambda: self._click("click 2D", "sam_click_2d"),
            "click 3D": lambda: self._click("click 3D", "sam_click_3d"),
            "landmarks": self._landmarks,
            "automatic": self._automatic,
            "save": self._save,
            "next case": self._next,
            "info": lambda: self._ask("info", "GET", "/info/"),
            "image": lambda: self._ask("image", "GET", f"/datastore/image?image={self._case()}"),
            "label": self._label,
            "session": self._own_volume,
            "train": self._train,
        }

    def work(self, end: float) -> None:
        """Until a moment of `time.monotonic`."""
        while time.monotonic() < end:
            kind = self._draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            self._acts[kind]()
            time.sleep(self._draw.uniform(0, 0.4))

    def _ask(self, kind: str, method: str, path: str, *expected: int, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            reply = self._session.request(method, self._url + path, timeout=TIMEOUT, **kwargs)
            reply.content  # noqa: B018 - to the last byte
        except requests.RequestException as error:
            self._record.errors[f"{kind}: {type(error).__name__}"] += 1
            return None
        self._record.seconds[kind].append(time.perf_counter() - start)
        if reply.status_code not in (200, *expected):
            self._record.errors[f"{kind}: {reply.status_code} {reply.text[:160]}"] += 1
        return reply

    def _case(self) -> str:
        return f"phantom_{self._draw.randrange(CASES):03d}"

    def _point(self) -> list[int]:
        return [self._draw.randrange(n // 4, 3 * n // 4) for n in SHAPE]

    def _infer(self, kind: str, model: str, params: dict[str, Any], *expected: int, query: str = "") -> None:
        form = {"params": json.dumps({"result_extension": ".nrrd", **params})}
        query = query or f"image={self._case()}"
        self._ask(kind, "POST", f"/infer/{model}?{query}", *expected, data=form)

    def _click(self, kind: str, model: str) -> None:
        first = self._point()
        params: dict[str, Any] = {"foreground": [first], "label": "liver"}
        self._infer(kind, model, params)
        params["background"] = [[*self._point()[:2], first[2]]]
        self._infer(kind, model, params)

    def _landmarks(self) -> None:
        self._infer("landmarks", "sam_multi", {"liver": [self._point()], "aorta": [self._point()]})

    def _automatic(self) -> None:
        self._infer("automatic", "unet", {}, 409)  # until one has been trained

    def _save(self) -> None:
        case = self._case()
        content = (self._truth / f"{case}.nii.gz").read_bytes()
        files = {"label": ("l.nii.gz", content)}
        self._ask("save", "PUT", f"/datastore/label?image={case}", files=files)

    def _next(self) -> None:
        strategy = self._draw.choice(["first", "random", "uncertainty", "diverse"])
        self._ask("next case", "POST", f"/activelearning/{strategy}", json={})

    def _label(self) -> None:
        self._ask("label", "GET", f"/datastore/label?label={self._case()}&tag=final", 404)

    def _own_volume(self) -> None:
        content = (self._truth.parent / f"{self._case()}.nii.gz").read_bytes()
        reply = self._ask("session", "PUT", "/session/", files={"files": ("own.nii.gz", content)})
        if reply is None or not reply.ok:
            return
        name = reply.json()["session_id"]
        self._infer("session", "sam_click_2d", {"foreground": [self._point()]}, query=f"session_id={name}")
        self._ask("session", "DELETE", f"/session/{name}")

    def _train(self) -> None:
        """Start one where none runs; where one does, look, and stop every fourth."""
        if self._draw.random() < 0.5:
            self._ask("train", "POST", "/train/unet", 409, 429, json={"iterations": 40})
        elif self._draw.random() < 0.5:
            self._ask("train", "GET", "/train/", 404)
        else:
            self._ask("train", "DELETE", "/train/")


def add_parser(commands: Any) -> None:
    """Add ``soak`` to the command line."""
    parser = commands.add_parser("soak", help="many clients for minutes: errors, memory, waits")
    parser.add_argument("--out", type=Path, required=True, help="folder for soak.md and the server's log")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--clients", type=int, default=8, help="clients at once")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write it; 1 where anything was answered wrongly."""
    from trainers.phantoms import write_phantoms

    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        studies = Path(name, "studies")
        studies.mkdir()
        write_phantoms(studies, count=CASES, shape=SHAPE)
        with servers.samloop(studies, args.out / "soak.log", []) as server:
            _soak(server, studies / "truth", record, args.minutes * 60, args.clients)
            peak = peak_memory(server.pid)
    text = report(record, args.minutes, args.clients, peak)
    print(text, end="")
    (args.out / "soak.md").write_text(text)
    return 1 if record.errors else 0


def _soak(server: servers.Server, truth: Path, record: Record, seconds: float, clients: int) -> None:
    start = time.monotonic()
    end = start + seconds
    threads = [
        threading.Thread(target=Client(url=server.url, truth=truth, record=record, seed=n).work, args=(end,))
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    watcher = Client(url=server.url, truth=truth, record=record, seed=-1)
    while any(thread.is_alive() for thread in threads):
        record.memory.append((time.monotonic() - start, resident_memory(server.pid)))
        watcher._ask("info, once a second", "GET", "/info/")
        time.sleep(LOOK)


def report(record: Record, minutes: float, clients: int, peak: int) -> str:
    """What is printed.

    Args:
        record: What happened.
        minutes: For how long.
        clients: How many did it.
        peak: The server's greatest resident memory, in bytes.
    """
    rows = []
    for kind, waits in sorted(record.seconds.items()):
        p50, p95, p99 = np.percentile(waits, [50, 95, 99])
        rows.append([kind, len(waits), f"{p50:.2f}", f"{p95:.2f}", f"{p99:.2f}", f"{max(waits):.2f}"])
    table = markdown(["request", "count", "p50 s", "p95 s", "p99 s", "slowest s"], rows)
    requests_ = sum(len(waits) for waits in record.seconds.values())
    errors = "".join(f"- {count} times {what}\n" for what, count in record.errors.most_common()) or "- none\n"
    slope, first, last = _slope(record.memory)
    wrong = sum(record.errors.values())
    return (
        f"{minutes:g} minutes, {clients} clients, {requests_} requests, {wrong} errors\n\n"
        f"{table}\nErrors:\n\n{errors}\n"
        f"Memory after the warm-up {first:.0f} MB, at the end {last:.0f} MB, at most {peak / 1e6:.0f} MB; "
        f"slope {round(slope, 2) + 0.0:+.2f} MB a minute\n\n{cpu_name()}\n"
    )


def _slope(memory: list[tuple[float, int]]) -> tuple[float, float, float]:
    """MB a minute after the warm-up, and MB at its begin and end."""
    kept = memory[int(len(memory) * WARM_UP) :]
    minutes, megabytes = np.array([(at / 60, held / 1e6) for at, held in kept]).T
    slope, _ = np.polyfit(minutes, megabytes, 1) if len(kept) > 2 else (float("nan"), 0.0)
    tenth = max(1, len(kept) // 10)
    return float(slope), float(megabytes[:tenth].mean()), float(megabytes[-tenth:].mean())
