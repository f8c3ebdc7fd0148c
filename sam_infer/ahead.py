"""Slices encoded before anyone clicks on them, while nobody waits."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary

logger = logging.getLogger(__name__)

#: Added to the niceness of the thread: a decoder that runs beside it gets the processor first.
_NICER = 10


@dataclass(kw_only=True)
class _Case:
    path: Path
    window: Window | None
    k: int | None
    done: int = 0
    of: int = 0


class EncodeAhead:
    """Encodes the slices of the case in use, outward from the slice in use, in one background thread.

    A request always goes first: no slice is begun while one is served or shortly after, and one slice at a
    time is encoded, so a click waits for at most one. The thread ends with a case when all its slices are
    encoded or no more embeddings can be kept, and leaves it when another is opened. Opening a case reads its
    file too, whatever the engine, so that the first click finds it in memory.

    Args:
        encoder: The engine behind its caches.
        library: Reads images.
        quiet: Seconds that must have passed since the last request.
    """

    def __init__(self, *, encoder: SliceEncoder, library: ImageLibrary, quiet: float = 0.5) -> None:
        self._encoder = encoder
        self._library = library
        self._quiet = quiet
        self._changed = threading.Condition()
        self._serving = 0
        self._last = 0.0
        self._case: _Case | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is served."""
        with self._changed:
            self._serving += 1
        try:
            yield
        finally:
            with self._changed:
                self._serving -= 1
                self._last = time.monotonic()
                self._changed.notify_all()

    def open(self, path: Path | str, *, window: Window | None = None, k: int | None = None) -> None:
        """Turn to a case.

        Args:
            path: Its file.
            window: As it is looked at; None = as chosen for it.
            k: The slice in use; None = the one before, or the middle.
        """
        path = Path(path)
        with self._changed:
            if self._closed:
                return
            case = self._case
            if case is None or case.path != path:
                self._case = _Case(path=path, window=window, k=k)
            elif window not in (None, case.window):
                self._case = _Case(path=path, window=window, k=case.k if k is None else k)
            elif k is not None:
                case.k = k
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="encode-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def progress(self, path: Path | str) -> dict[str, int] | None:
        """Slices ``done``, ``of`` how many; None where this case is not being encoded."""
        with self._changed:
            case = self._case
            if case is None or case.path != Path(path) or not case.of:
                return None
            return {"done": case.done, "of": case.of}

    def close(self) -> None:
        """End the thread after the slice that it encodes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICER)
        worked: _Case | None = None
        while True:
            with self._changed:
                while not self._closed and self._case is worked:
                    self._changed.wait()
                worked = self._case
            if self._closed or worked is None:
                return
            try:
                self._work(worked)
            except InputError as error:
                logger.info("Nothing is encoded ahead: %s", error)
            except Exception:
                logger.exception("%s is not encoded ahead", worked.path.name)

    def _work(self, case: _Case) -> None:
        if not self._may_go_on(case):
            return
        image = self._library.read(case.path)
        if self._encoder.engine.encoding is None:
            return
        window = case.window or self._library.window_for(image, {})
        with self._changed:
            case.window, case.of = window, image.shape[2]
        left, kept = set(range(image.shape[2])), 0
        while left and kept < self._encoder.room and self._may_go_on(case):
            middle = image.shape[2] // 2 if case.k is None else case.k
            k = min(left, key=lambda n: (abs(n - middle), -n))
            left.remove(k)
            kept += self._encoder.packed(image, k, window)[0].nbytes
            with self._changed:
                case.done += 1

    def _may_go_on(self, case: _Case) -> bool:
        """Wait until nobody is served; False where the case is no longer the one in use."""
        with self._changed:
            while not self._closed and self._case is case:
                rest = self._last + self._quiet - time.monotonic()
                if not self._serving and rest <= 0:
                    return True
                self._changed.wait(rest if not self._serving else None)
            return False
