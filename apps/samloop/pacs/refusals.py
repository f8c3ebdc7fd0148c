"""Series that cannot be used, and why; remembered so that they are not fetched again and again."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from apps.samloop.pacs.dicomweb import SeriesEntry
from sam_infer.errors import InputError
from sam_infer.files import write_atomic

#: Seconds after which it is tried again: the PACS, or this program, may have been mended.
FORGET = 24 * 3600.0
logger = logging.getLogger(__name__)


class NoVolumeError(InputError):
    """A series of the PACS that cannot be used (422).

    Args:
        uid: Its SeriesInstanceUID.
        reason: Why, and what to do.
    """

    def __init__(self, uid: str, reason: str) -> None:
        super().__init__("image", uid, reason, status=422)


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    count: int | None
    reason: str
    when: float


class Refusals:
    """What cannot be used.

    Args:
        path: File that it is kept in.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, _Refusal] = {}
        self._seen: tuple[int, int] | None = None

    @property
    def version(self) -> object:
        """Differs whenever something was refused."""
        self._read()
        return self._seen

    def reason(self, entry: SeriesEntry) -> str | None:
        """Why a series cannot be used; None where it can, has changed, or has not been tried for a day."""
        return self.reasons([entry]).get(entry.uid)

    def reasons(self, entries: Iterable[SeriesEntry]) -> dict[str, str]:
        """Those of some series that cannot be used, and why; see `reason`."""
        known, now = self._read(), time.time()
        refused = ((entry, known.get(entry.uid)) for entry in entries)
        return {
            entry.uid: refusal.reason
            for entry, refusal in refused
            if refusal is not None and refusal.count == entry.count and now - refusal.when <= FORGET
        }

    def add(self, entry: SeriesEntry, reason: str) -> None:
        """Remember a series."""
        logger.warning("Left out: series %s (%s): %s", entry.uid, entry.modality, reason)
        with self._lock:
            known = {u: r for u, r in self._read().items() if time.time() - r.when <= FORGET}
            known[entry.uid] = _Refusal(count=entry.count, reason=reason, when=time.time())
            content = {uid: asdict(refusal) for uid, refusal in known.items()}
            write_atomic(self._path, json.dumps(content).encode())

    def _read(self) -> dict[str, _Refusal]:
        """What is known, as another process may have learned it."""
        with suppress(OSError, ValueError, TypeError):
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                found = json.loads(self._path.read_text("utf-8"))
                self._known = {uid: _Refusal(**refusal) for uid, refusal in found.items()}
                self._seen = seen
        return self._known
