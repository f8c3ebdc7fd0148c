"""Noticing files that come and go: many events make one call, some time later."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserver

from sam_infer.volumes import extension

logger = logging.getLogger(__name__)

#: Seconds from an event to the look at the files; a copied folder is thousands of events.
SETTLE = 0.5
_KINDS = {"created", "deleted", "moved", "closed"}


class Later:
    """Calls something once, some time after it was first asked for.

    Args:
        call: What; its errors are logged.
        seconds: How much later.
    """

    def __init__(self, call: Callable[[], object], *, seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def ask(self) -> None:
        """Have it called; asked for again before that, it is called once."""
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(self._seconds, self._run)
                self._timer.daemon = True
                self._timer.start()

    def now(self) -> None:
        """Call it now if it was asked for and has not been called."""
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._try()

    def _run(self) -> None:
        with self._lock:
            self._timer = None
        self._try()

    def _try(self) -> None:
        try:
            self._call()
        except Exception:
            logger.exception("%s failed", self._call)


class Watch:
    """Tells which image files of a studies folder came, went or were written.

    Args:
        seen: Is called in a thread of its own with the paths, `SETTLE` seconds after the first of them.
    """

    def __init__(self, seen: Callable[[set[Path]], object]) -> None:
        self._seen = seen
        self._paths: set[Path] = set()
        self._lock = threading.Lock()
        self._later = Later(self._tell, seconds=SETTLE)
        self._observer: BaseObserver | None = None

    def start(self, images: Path, labels: Path, *, poll: bool) -> None:
        """Watch the images' folder, and the labels' with the folders in it.

        Args:
            images: The folder of images.
            labels: The folder of labels.
            poll: Look at all files again and again, where the system tells of no event (network drives).
        """
        handler = FileSystemEventHandler()
        handler.on_any_event = self._note  # type: ignore[method-assign]
        observer = PollingObserver() if poll else Observer()
        try:
            observer.schedule(handler, str(images))
            observer.schedule(handler, str(labels), recursive=True)
            observer.start()
        except OSError as error:
            logger.error("Files that come or go are not noticed by themselves: %s", error)
            return
        self._observer = observer

    def stop(self) -> None:
        """Watch no more."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(10)
            self._observer = None

    def _note(self, event: FileSystemEvent) -> None:
        if event.is_directory or event.event_type not in _KINDS:
            return
        names = (str(name) for name in (event.src_path, event.dest_path) if name)
        paths = {Path(name) for name in names if extension(name) and not Path(name).name.startswith(".")}
        if paths:
            with self._lock:
                self._paths |= paths
            self._later.ask()

    def _tell(self) -> None:
        with self._lock:
            paths, self._paths = self._paths, set()
        self._seen(paths)
