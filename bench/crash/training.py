"""Trainings that are killed: what they publish is whole, and no label is touched."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file

import trainers.round
from apps.samloop.journal import HOME
from apps.samloop.store import SafeDatastore
from bench.crash.book import Book, look
from bench.crash.saving import in_child
from sam_infer.files import sha256_of
from sam_infer.intensity import Window
from trainers import phantoms
from trainers.basis import Basis
from trainers.unet import UnetTrainer

#: Accepted cases that are learned from, however many images there are: phantoms, so that there is something.
ACCEPTED = 20
SHAPE = (64, 64, 16)
#: Rounds as short as can be: many kills meet what comes before and after the learning.
REQUEST = {"iterations": 24, "batch_size": 2}
#: Seconds between two copies of a training's state, so that kills meet the writing of one too.
_KEEP_SECONDS = 0.2
_WINDOW = Window(level=50.0, width=400.0)


def kill_trainings(
    folder: Path, *, images: int, kills: int, seed: int, every: Callable[[int], None]
) -> Counter[str]:
    """Kill trainings so many times at random moments; the next one goes on, or begins anew. See `look`.

    Args:
        folder: The studies folder, of at least `ACCEPTED` images without labels.
        images: How many it has.
        kills: How often.
        seed: Chooses the moments.
        every: Is told the number of kills so far.
    """
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    in_child(_accept, folder)
    labels = {path: sha256_of(path) for path in (folder / "labels" / "final").iterdir()}
    begun = time.monotonic()
    _train(folder, wait=None)
    length = time.monotonic() - begun
    while total["kills"] < kills:
        killed = _train(folder, wait=rng.uniform(0.0, length))
        total["kills"] += killed
        total["trainings that ended"] += not killed
        total += in_child(look, folder, Book(), images)[0]
        total["labels lost"] += sum(sha256_of(path) != before for path, before in labels.items())
        total += in_child(_served, folder)
        if killed:
            every(total["kills"])
    total["rounds in the ledger"] = in_child(_rounds, folder)
    return total


def _accept(folder: Path) -> None:
    """Put phantoms in the place of the first images, and accept their truth."""
    for image in sorted(folder.glob("*.nii.gz"))[:ACCEPTED]:
        image.unlink()
    phantoms.write_phantoms(folder, count=ACCEPTED, shape=SHAPE)
    store = SafeDatastore(str(folder), labels=phantoms.LABELS, auto_reload=False)
    for truth in sorted((folder / "truth").glob("*.nii.gz")):
        store.save_label(truth.name.removesuffix(".nii.gz"), str(truth), "final", {})
    store.close()


def _trainer(folder: Path) -> UnetTrainer:
    basis = Basis(
        model_dir=folder / HOME / "models",
        labels=phantoms.LABELS,
        window_for=lambda image, request: _WINDOW,
        size=64,
    )
    return UnetTrainer(basis)


def _train(folder: Path, *, wait: float | None) -> bool:
    """Train in a child, which is killed after some seconds; whether it was, or ended before."""
    child = os.fork()
    if not child:
        _child(folder)
    end = time.monotonic() + wait if wait is not None else None
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError("a training failed; see above")
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _child(folder: Path) -> NoReturn:
    try:
        torch.set_num_threads(1)
        trainers.round.KEEP_SECONDS = _KEEP_SECONDS
        store = SafeDatastore(str(folder), labels=phantoms.LABELS, auto_reload=False)
        _trainer(folder)(REQUEST, store)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _served(folder: Path) -> Counter[str]:
    """Troubles with what is served: it must be whole, and the ledger must know it."""
    trainer = _trainer(folder)
    found: Counter[str] = Counter()
    if trainer.path.exists():
        try:
            load_file(trainer.path)
        except Exception as error:
            print(f"the published model cannot be read: {error!r}", flush=True)
            found["models damaged"] += 1
        found["models without a line"] += trainer.publisher.in_force() is None
    return found


def _rounds(folder: Path) -> int:
    return len(_trainer(folder).publisher.lines())
