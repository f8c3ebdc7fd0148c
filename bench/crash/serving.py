"""A server that is killed while clients save labels over HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import requests

from bench import servers
from bench.crash.book import Book, look, look_again
from bench.crash.saving import IMAGES, in_child, write_label
from bench.store import LABELS

CLIENTS = 3
#: Seconds of saving before a kill, at most.
_WINDOW = 3.0


def kill_servers(
    folder: Path, *, images: int, kills: int, seed: int, every: Callable[[int], None]
) -> Counter[str]:
    """Kill a server so many times at random moments while clients save; see `look`.

    Args:
        folder: The studies folder.
        images: How many images it has.
        kills: How often.
        seed: Chooses the moments and what is saved.
        every: Is told the number of kills so far.
    """
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    book = Book()
    names = sorted(p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz"))
    for n in range(kills):
        with servers.samloop(folder, folder.parent / "server.log", ["--labels", ",".join(LABELS)]) as server:
            lock = threading.Lock()
            clients = [
                threading.Thread(
                    target=_save_for_ever,
                    args=(server.url, names[i::CLIENTS][:IMAGES], rng.randrange(1 << 30), book, lock),
                )
                for i in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            time.sleep(rng.uniform(0.0, _WINDOW))
            os.kill(server.pid, signal.SIGKILL)
            for client in clients:
                client.join()
        found, book = in_child(look, folder, book, images)
        total += found
        every(n + 1)
    total += in_child(look_again, folder, book, images)
    total["kills"], total["saves answered"] = kills, book.answered
    return total


def _save_for_ever(url: str, names: list[str], seed: int, book: Book, lock: threading.Lock) -> None:
    """Save labels until the server is gone; what was answered with 200 is in the book."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="samloop-") as scratch:
        path = Path(scratch, "label.nii.gz")
        while True:
            write_label(path, rng)
            told = {"image": rng.choice(names), "tag": "final"}
            with lock:
                book.take(told)
            try:
                with path.open("rb") as file:
                    reply = requests.put(
                        f"{url}/datastore/label",
                        params=told,
                        files={"label": file},
                        data={"params": json.dumps({"client_id": "crash"})},
                        timeout=60,
                    )
                reply.raise_for_status()
                stored = requests.get(
                    f"{url}/datastore/label/history", params=told, timeout=60
                )  # of one's own image: nobody else saves it
                sha256 = stored.json()["versions"][-1]["sha256"]
            except requests.RequestException:
                return
            with lock:
                book.take({**told, "done": "saved", "sha256": sha256})
