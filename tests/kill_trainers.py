"""Kills each trainer in the middle, again and again, and lets it end; prints what became of it as JSON.

Run as a process of its own, so that the children that are killed start from one thread:
python -m tests.kill_trainers FOLDER
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

import trainers.round
from tests.semi_data import (
    HELD,
    NAMES,
    SAM_TRAINERS,
    UNET_TRAINERS,
    add_blanks,
    draw_boxes,
    make_store,
    make_trainer,
    rate_discs,
)

REQUEST = {"iterations": 24, "learning_rate": 0.005, "aligning_iterations": 16}
#: States of the loop that a child keeps before it is killed; divides none of 16, 24 and 48.
EVERY = 7


def killed(task, store):
    """Train in a child that is killed once it kept its state `EVERY` times; whether it was."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        keep = trainers.round.Checkpoint.save

        def save(self, state):
            keep(self, state)
            os.write(write, b".")

        trainers.round.Checkpoint.save = save
        try:
            task(REQUEST, store)
        finally:
            os._exit(0)
    os.close(write)
    if all(os.read(read, 1) for _ in range(EVERY)):
        os.kill(child, signal.SIGKILL)
    os.close(read)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(root):
    torch.set_num_threads(1)
    trainers.round.KEEP_SECONDS = 0.0
    found = {}
    for name in (*UNET_TRAINERS, "cam_classifier", *SAM_TRAINERS):
        results = []
        for part in ("whole", "killed"):
            folder = root / name / part
            store = make_store(folder)
            draw_boxes(folder, [n for n in NAMES if n not in HELD])
            rate_discs(folder)
            task = make_trainer(name, folder)
            served = make_trainer("unet", folder) if name in UNET_TRAINERS else task
            if name in ("cam_classifier", "sam_mix"):
                add_blanks(store)
            served({"iterations": 2, "batch_size": 2}, store)
            if not served.path.exists():  # a model that is no better than chance or its base is not served
                served.path.write_bytes(b"none yet")
            before = {p: digest(p) for p in (folder / "labels").iterdir()} | {
                served.path: digest(served.path)
            }
            kills = 0
            if part == "killed":
                while killed(task, store):
                    kills += 1
                    assert {p: digest(p) for p in before} == before, "a label or the served model changed"
                    assert task.stats().get("running") is None
            else:
                task(REQUEST, store)
            stats = task.stats()
            results.append(
                {
                    "kills": kills,
                    "loss": stats["loss"],
                    "reached": [value for key, value in stats.items() if key.startswith("candidate_")],
                    "weights": digest_of_weights(task) if stats["published"] else None,
                    "left": sorted(p.name for p in task.path.parent.glob("*-work")),
                    "labels": all(digest(p) == before[p] for p in before if p != served.path),
                }
            )
        found[name] = results
    print(json.dumps(found))


def digest_of_weights(task):
    """Of the served weights without their header, which tells seconds and rounds."""
    from safetensors.torch import load_file

    state = load_file(task.path)
    return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
