"""Segmentations on their way to the PACS: on disk from the acceptance of a label until they are there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from apps.samloop.pacs.client import RefusedError
from sam_infer.errors import InputError, UnavailableError
from sam_infer.files import sweep, sync, write_atomic

#: Seconds between attempts; after a refusal they double up to the last.
AGAIN, LAST = 5.0, 300.0
#: Seconds that whoever accepts a label waits for another sender.
_BUSY = 1.4
logger = logging.getLogger(__name__)


class Outbox:
    """Labels that wait for the PACS, one file each: its DICOM SEG, or nothing where that is still to be made.

    Args:
        folder: Where they are.
        make: Gives the DICOM SEG of an image's accepted label.
        send: Sends one.
        sent: Called with image and DICOM SEG once it is in the PACS.
    """

    def __init__(
        self,
        folder: Path,
        *,
        make: Callable[[str], bytes],
        send: Callable[[bytes], None],
        sent: Callable[[str, bytes], None],
    ) -> None:
        self._folder = folder
        self._make, self._send, self._sent = make, send, sent
        self._lock = FileLock(str(folder / ".lock"))
        self._not_before: dict[str, tuple[float, float]] = {}
        self._reasons: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)

    def waiting(self) -> dict[str, Path]:
        """The newest entry of each image that has one."""
        return {path.name.rpartition("@")[0]: path for path in sorted(self._folder.glob("[!.]*@*"))}

    def reason(self, image_id: str) -> str | None:
        """Why an image's label could not be sent when that was tried last."""
        return self._reasons.get(image_id)

    def put(self, image_id: str, content: bytes = b"") -> None:
        """Add an image's label; one that still waits is replaced.

        Args:
            image_id: The image.
            content: The DICOM SEG; empty = it is made when it is sent.
        """
        before = self._entries(image_id)
        write_atomic(self._folder / f"{image_id}@{time.time_ns():020d}", content)
        self._forget(before)
        self._reasons.pop(image_id, None)
        self._not_before.pop(image_id, None)

    def drop(self, image_id: str) -> None:
        """Take an image's label out, unsent."""
        self._forget(self._entries(image_id))

    def deliver(self, image_id: str) -> str | None:
        """Send an image's label now.

        Returns:
            None when nothing of it waits any more, else why it still does.
        """
        try:
            with self._lock.acquire(timeout=_BUSY):
                for path in self._entries(image_id):
                    self._deliver(image_id, path)
        except Timeout:
            return "another label is being sent"
        return self._reasons.get(image_id) if self._entries(image_id) else None

    def start(self) -> None:
        """Begin to send what waits, in a thread, again and again."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="pacs-outbox", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; what waits is sent when it is started again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._thread = None

    def _run(self) -> None:
        while True:
            try:
                self._round()
            except Exception:
                logger.exception("The outbox %s", self._folder)
            if self._stop.wait(AGAIN):
                return

    def _round(self) -> None:
        for image_id in self.waiting():
            if self._stop.is_set():
                return
            if time.monotonic() >= self._not_before.get(image_id, (0.0, 0.0))[0]:
                self.deliver(image_id)

    def _deliver(self, image_id: str, path: Path) -> None:
        """Send one entry and forget it; alone."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        try:
            if not content:
                content = self._make(image_id)
                write_atomic(path, content)
            self._send(content)
        except (UnavailableError, InputError) as error:
            self._failed(image_id, error)
            return
        except Exception as error:
            logger.exception("The label of %s cannot be sent", image_id)
            self._failed(image_id, error)
            return
        self._sent(image_id, content)
        self._forget([path])
        self._reasons.pop(image_id, None)
        self._not_before.pop(image_id, None)

    def _failed(self, image_id: str, error: Exception) -> None:
        if self._reasons.get(image_id) != str(error):
            logger.warning("The label of %s waits: %s", image_id, error)
        self._reasons[image_id] = str(error)
        if isinstance(error, RefusedError) or not isinstance(error, UnavailableError):
            pause = min(2 * self._not_before.get(image_id, (0.0, AGAIN / 2))[1], LAST)
            self._not_before[image_id] = (time.monotonic() + pause, pause)

    def _entries(self, image_id: str) -> list[Path]:
        return sorted(self._folder.glob(f"{image_id}@*"))

    def _forget(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        if paths:
            sync(self._folder)
