"""Processes that save, note, remove and put back labels until they are killed."""

from __future__ import annotations

import json
import os
import pickle
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import numpy as np

from apps.samloop.store import SafeDatastore
from bench.crash.book import Book, look, look_again
from bench.store import LABELS, SHAPE
from sam_infer.files import sha256_of

#: Processes that write the same store at once, as the server and batch inference do; each has its own images.
WRITERS = 2
#: Images that a writer changes: few, so that each is changed often.
IMAGES = 10
TAGS = ("final", "original")
_KINDS = (".nii.gz", ".nii", ".nrrd")
#: The share of kills that fall into the start, and the seconds of saving before the others, at most.
_EARLY = 0.2
_WINDOW = 1.0
#: Seconds that a start may take.
_PATIENCE = 300.0


def kill_savers(
    folder: Path, *, images: int, kills: int, seed: int, every: Callable[[int], None]
) -> Counter[str]:
    """Kill the writers of a store so many times at random moments, its start included; see `look`.

    Args:
        folder: The studies folder.
        images: How many images it has.
        kills: How often.
        seed: Chooses the moments and what is written.
        every: Is told the number of kills so far.
    """
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    book = Book()
    begun = time.monotonic()
    in_child(look, folder, book, images)
    start = time.monotonic() - begun
    for n in range(kills):
        early = rng.uniform(0.0, start) if rng.random() < _EARLY else None
        seeds = [rng.randrange(1 << 30) for _ in range(WRITERS)]
        ready = _round(folder, book, seeds, early=early, late=rng.uniform(0.0, _WINDOW))
        start = ready or start
        found, book = in_child(look, folder, book, images)
        total += found
        total["kills before the first save"] += ready is None
        every(n + 1)
    total += in_child(look_again, folder, book, images)
    total["kills"], total["saves answered"] = kills, book.answered
    return total


def _round(folder: Path, book: Book, seeds: list[int], *, early: float | None, late: float) -> float | None:
    """Start the writers, read what they say, kill them.

    Args:
        folder: The studies folder.
        book: Is told what they say.
        seeds: One for each of them.
        early: Seconds from their start to the kill; None = ``late``.
        late: Seconds from when all are ready to the kill.

    Returns:
        Seconds until all were ready; None where they were killed before.
    """
    begun, children, readers = time.monotonic(), [], {}
    end, ready = begun + (_PATIENCE if early is None else early), 0
    seconds: float | None = None
    for number, seed in enumerate(seeds):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            _write_for_ever(folder, number, seed, write)
        os.close(write)
        children.append(child)
        readers[read] = b""
    killed = False
    try:
        while readers:
            left = end - time.monotonic()
            if left <= 0 and not killed:
                killed = _kill(children)
            for reader in select.select(list(readers), [], [], None if killed else max(left, 0))[0]:
                piece = os.read(reader, 1 << 16)
                *lines, rest = (readers[reader] + piece).split(b"\n")
                readers[reader] = rest
                for told in map(json.loads, lines):
                    if "ready" not in told:
                        book.take(told)
                        continue
                    ready += 1
                    if ready == len(seeds):
                        seconds = time.monotonic() - begun
                        end = min(end, time.monotonic() + late)
                if not piece:
                    os.close(reader)
                    del readers[reader]
    finally:
        if not killed:
            _kill(children)
    for child in children:
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"a writer ended by itself with status {status}")
    return seconds


def _kill(children: list[int]) -> bool:
    for child in children:
        os.kill(child, signal.SIGKILL)
    return True


def _write_for_ever(folder: Path, number: int, seed: int, pipe: int) -> NoReturn:
    """In the child: change labels, and tell before and after each change."""
    try:
        rng = random.Random(seed)

        def tell(**told: Any) -> None:
            os.write(pipe, json.dumps(told).encode() + b"\n")

        store = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
        tell(ready=True)
        names = sorted(store.list_images())[number::WRITERS]
        names = random.Random(number).sample(names, min(IMAGES, len(names)))
        with tempfile.TemporaryDirectory(prefix="samloop-") as scratch:
            while True:
                image, tag = rng.choice(names), rng.choice(TAGS)
                tell(image=image, tag=tag)
                tell(image=image, tag=tag, **_change(store, image, tag, rng, Path(scratch)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def _change(store: SafeDatastore, image: str, tag: str, rng: random.Random, scratch: Path) -> dict[str, Any]:
    uri, chance = store.get_label_uri(image, tag), rng.random()
    if uri and chance < 0.1:
        store.remove_label(image, tag)
        return {"done": "removed", "sha256": None}
    if uri and chance < 0.3:
        note = rng.randrange(1 << 30)
        store.update_label_info(image, tag, {"note": note})
        return {"done": "noted", "note": note}
    told = store.label_history(image, tag) if chance < 0.4 else []
    if known := [version["sha256"] for version in told if version.get("available")]:
        sha256 = rng.choice(known)
        store.restore_label(image, tag, sha256, {"client_id": "crash", "note": None})
        return {"done": "restored", "sha256": sha256}
    path = scratch / f"label{rng.choice(_KINDS)}"
    write_label(path, rng)
    store.save_label(image, str(path), tag, {"client_id": "crash"})
    return {"done": "saved", "sha256": sha256_of(Path(store.get_label_uri(image, tag)))}


def write_label(path: Path, rng: random.Random) -> None:
    """A label map of a random box, unlike any before it."""
    values = np.zeros(SHAPE, np.uint8)
    low = [rng.randrange(side // 2) for side in SHAPE]
    values[low[0] : low[0] + 12, low[1] : low[1] + 12, low[2] :] = rng.choice(list(LABELS.values()))
    noise = np.random.default_rng(rng.randrange(1 << 30))
    values[:, 0] = noise.integers(0, 2, (SHAPE[0], SHAPE[2]))
    if path.suffix == ".nrrd":
        from sam_infer.volumes import labelmap_bytes

        path.write_bytes(labelmap_bytes(np.asfortranarray(values), np.eye(4), ".nrrd"))
    else:
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def in_child(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own, so that this one stays small and without threads."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            try:
                pickle.dump(call(*arguments), pipe)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("a child failed; see above")
    return pickle.loads(content)
