"""The two datastores when they are killed while saving, and the two servers over a damaged index."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path

import nibabel as nib
import numpy as np
import requests
from monailabel.datastore.local import LocalDatastore, LocalDatastoreModel

from apps.samloop.store import SafeDatastore
from bench.robustness.subject import STOCK, Subject, last_error, told

#: Images of the store that is killed.
IMAGES = 20
SHAPE = (12, 10, 6)


def killed(name: str, folder: Path, kills: int) -> str:
    """Kill a process that saves one label after the other, so many times, each over a fresh store."""
    damaged = lost = 0
    label = folder / "label.nii"
    folder.mkdir(parents=True)
    affine = np.diag([1.5, 1.5, 3, 1])
    label.write_bytes(nib.Nifti1Image(np.ones(SHAPE, np.uint8), affine).to_bytes())
    for round_ in range(kills):
        studies = folder / f"{round_}"
        studies.mkdir()
        for n in range(IMAGES):
            image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), affine)
            nib.save(image, studies / f"case_{n}.nii.gz")
        told_ = studies.with_suffix(".saved")
        child = os.fork()
        if child == 0:
            try:
                _save_for_ever(name, studies, label, told_)
            finally:
                os._exit(1)  # it must never run on as its parent
        while not (told_.exists() and told_.stat().st_size):
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError("the process that saves has ended by itself")
            time.sleep(0.005)
        time.sleep(random.Random(round_).uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = set(told_.read_text().split())
        try:
            LocalDatastoreModel.model_validate_json((studies / "datastore_v2.json").read_bytes())
        except (ValueError, OSError):
            damaged += 1
        lost += bool(saved - _known(name, studies))
    store = "after each start all of them are there" if not lost else f"**after {lost} kills some are gone**"
    return f"index damaged by {damaged} of {kills} kills; of the labels that were saved, {store}"


def _open(name: str, studies: Path) -> LocalDatastore:
    if name == STOCK:
        return LocalDatastore(str(studies), auto_reload=False)
    return SafeDatastore(str(studies), labels={"liver": 1}, auto_reload=False)


def _save_for_ever(name: str, studies: Path, label: Path, told_: Path) -> None:
    """In the child: save, and note each save after it has returned."""
    store = _open(name, studies)
    with told_.open("w") as notes:
        while True:
            for n in range(IMAGES):
                store.save_label(f"case_{n}", str(label), "final", {})
                notes.write(f"case_{n}\n")
                notes.flush()


def _known(name: str, studies: Path) -> set[str]:
    """The accepted cases that the store knows when it is opened again; none where it cannot be."""
    try:
        with redirect_stdout(io.StringIO()):  # stock prints what is wrong
            return set(_open(name, studies).get_labeled_images())
    except Exception:
        return set()


def damaged_index(
    start: Callable[[], AbstractContextManager[Subject]],
    studies: Path,
    log: Path,
    damage: Callable[[bytes], bytes],
) -> str:
    """Start a server over an index that is damaged."""
    index = studies / "datastore_v2.json"
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    try:
        with start() as server:
            reply = requests.get(f"{server.url}/info/", timeout=60)
            count = reply.json()["datastore"]
            return f"starts; /info/ {told(reply)}, {count['total']} cases, {count['completed']} accepted"
    except RuntimeError:
        return f"**does not start**: {last_error(log.read_text(errors='replace'))}"
    finally:
        if len(index.read_bytes()) < len(whole) // 2:
            index.write_bytes(whole)
