"""What the store costs with many cases: starting, listing, the next case, saving.

python -m bench store --out results --cases 20,5000

It makes a folder of small images, most with an accepted label and a proposal, starts the store over it and
times each call; with --server also what the same costs over HTTP.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

from apps.samloop.store import SafeDatastore
from apps.samloop.strategies import First
from bench import servers
from bench.proc import cpu_name
from bench.table import markdown

SHAPE = (32, 32, 16)
LABELS = {"liver": 1, "spleen": 2}
#: One case in so many has no accepted label.
OPEN = 5


def add_parser(commands: Any) -> None:
    """Add ``store`` to the command line."""
    parser = commands.add_parser("store", help="what the store costs with many cases")
    parser.add_argument("--out", type=Path, required=True, help="folder for store.md and store.json")
    parser.add_argument("--cases", default="20,5000", help="numbers of cases")
    parser.add_argument("--calls", type=int, default=30, help="calls of each kind")
    parser.add_argument("--server", action="store_true", help="time the same over HTTP too")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write it."""
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, list[float]]] = {}
    for count in map(int, args.cases.split(",")):
        with tempfile.TemporaryDirectory(prefix="samloop-store-", dir=args.out) as name:
            folder = Path(name, "studies")
            fill(folder, count)
            found[count] = called(folder, args.calls)
            if args.server:
                found[count] |= served(folder, args.calls, args.out / f"store-{count}.log")
    text = f"{table(found)}\n{cpu_name()}\n"
    print(text, end="")
    (args.out / "store.md").write_text(text)
    (args.out / "store.json").write_text(json.dumps(found, indent=1))
    return 0


def fill(folder: Path, count: int, *, accepted: bool = True) -> None:
    """Make a studies folder, with the index of a plain MONAI Label.

    Args:
        folder: It.
        count: Images.
        accepted: Whether most have an accepted label, and all a proposal.
    """
    for place in ("labels/final", "labels/original"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    image, label = folder / "case_0000.nii.gz", folder / "labels" / "original" / "case_0000.nii.gz"
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.integers(-1000, 1000, SHAPE, np.int16), np.eye(4)), image)
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), np.eye(4)), label)
    objects: dict[str, Any] = {}
    for n in range(count):
        name = f"case_{n:04d}"
        file = f"{name}.nii.gz"
        known = {"ts": 1, "name": file}
        said = {"ext": ".nii.gz", "info": {**known, "client_id": "reader", "label_info": _names()}}
        proposed = {"ext": ".nii.gz", "info": {**known, "model": "unet", "params": _params()}}
        labels = {"original": proposed, **({"final": said} if n % OPEN else {})} if accepted else {}
        objects[name] = {
            "image": {"ext": ".nii.gz", "info": {**known, "strategy": {"first": {"ts": 1}}}},
            "labels": labels,
        }
        for source, place in ((image, "."), *((label, f"labels/{tag}") for tag in objects[name]["labels"])):
            if not (folder / place / file).exists():
                shutil.copy(source, folder / place / file)
    index = {"name": "n", "description": "d", "images_dir": ".", "labels_dir": "labels", "objects": objects}
    (folder / "datastore_v2.json").write_text(json.dumps(index))


def called(folder: Path, calls: int) -> dict[str, list[float]]:
    """Seconds of each call of the store by what it does."""
    seconds: dict[str, list[float]] = {}

    def timed(what: str, call: Callable[[], object], times: int = calls) -> None:
        seconds[what] = [_seconds(call) for _ in range(times)]

    def start() -> SafeDatastore:
        return SafeDatastore(str(folder), labels=LABELS, auto_reload=False)

    timed("first start", start, 1)
    timed("start", start, 3)
    store, other = start(), start()
    strategy, names = First(), cycle(sorted(store.get_labeled_images()))

    def next_case() -> None:
        chosen = strategy({"client_id": "reader"}, store)
        store.update_image_info(chosen["id"], {"strategy": {"first": {"ts": 1, "client_id": "reader"}}})

    with _label() as label:

        def save(where: SafeDatastore) -> str:
            return where.save_label(next(names), label, "final", {"label_info": _names(), "client_id": "r"})

        timed("status", store.status)
        timed("next case", next_case)
        timed("save", lambda: save(store))
        timed("save, two processes in turn", lambda: (save(store), save(other)))
        timed("accepted cases (datalist)", store.datalist)
        timed("reconcile", store.refresh, 5)
    return seconds


def served(folder: Path, calls: int, log: Path) -> dict[str, list[float]]:
    """Seconds of each request to a server over the folder."""
    seconds: dict[str, list[float]] = {}
    with servers.samloop(folder, log, ["--labels", ",".join(LABELS)]) as server, _label() as label:
        seconds["server: until it answers"] = [server.start]
        names = cycle([f"case_{n:04d}" for n in range(1, OPEN)])

        def timed(what: str, method: str, path: str, times: int = calls, **body: Any) -> None:
            def call() -> None:
                requests.request(method, server.url + path, timeout=600, **body).raise_for_status()

            seconds[what] = [_seconds(call) for _ in range(times)]

        def save() -> None:
            with label_file.open("rb") as file:
                path = f"{server.url}/datastore/label?image={next(names)}"
                form = {"params": json.dumps({"label_info": _names()})}
                requests.put(path, data=form, files={"label": file}, timeout=600).raise_for_status()

        label_file = Path(label)
        timed("GET /info/", "GET", "/info/")
        timed("GET /datastore/", "GET", "/datastore/")
        timed("GET /datastore/?output=all", "GET", "/datastore/?output=all", 5)
        timed("GET /datastore/?output=train", "GET", "/datastore/?output=train", 5)
        timed("POST /activelearning/first", "POST", "/activelearning/first", json={})
        seconds["PUT /datastore/label"] = [_seconds(save) for _ in range(calls)]
    return seconds


def table(found: dict[int, dict[str, list[float]]]) -> str:
    """Milliseconds, median and slowest, as a markdown table."""
    head = ["ms, median (slowest)", *(f"{count} cases" for count in found)]
    rows = []
    for what in next(iter(found.values())):
        cells = [times[what] for times in found.values()]
        rows.append([what, *(f"{np.median(c) * 1e3:.1f} ({max(c) * 1e3:.1f})" for c in cells)])
    return markdown(head, rows)


def _names() -> list[dict[str, Any]]:
    return [{"name": name, "idx": index} for name, index in LABELS.items()]


def _params() -> dict[str, Any]:
    objects = {name: {"score": 0.9, "agreement": 0.9, "slices": list(range(16))} for name in LABELS}
    return {"label_names": LABELS, "objects": objects, "latencies": {"load": 0.1, "total": 0.2}}


@contextmanager
def _label() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="samloop-") as name:
        path = Path(name, "label.nii.gz")
        values = np.zeros(SHAPE, np.uint8)
        values[4:20, 4:20] = 1
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        yield str(path)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
