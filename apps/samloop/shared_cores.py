"""The machine's cores, shared between the requests that are in work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SharedCores:
    """Gives a request that is alone all cores, and those that come meanwhile their share.

    Torch keeps the number of threads for each calling thread, so requests do not change each other's.

    Args:
        cores: How many there are.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._lock = threading.Lock()
        self._working = 0

    @contextmanager
    def request(self) -> Iterator[int]:
        """While a request is worked on, by the calling thread; the number of its threads."""
        with self._lock:
            self._working += 1
            mine = max(1, self._cores // self._working)
        torch.set_num_threads(mine)
        try:
            yield mine
        finally:
            with self._lock:
                self._working -= 1
