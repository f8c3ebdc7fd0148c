"""Which series a PACS holds: asked again after two seconds, never waited for longer than a moment."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apps.samloop.pacs.client import PATIENCE, PacsClient
from apps.samloop.pacs.dicomweb import SeriesEntry
from sam_infer.errors import UnavailableError
from sam_infer.files import write_atomic

#: Seconds for which a list is taken as it is; that a request waits for a new one; that a PACS that answers
#: other questions is given for it.
FRESH, WAIT, LONG = 2.0, 1.4, 5.0
#: Seconds in which a PACS lists what it was sent.
_LISTED_WITHIN = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the PACS listed.

    Args:
        images: Series of images by uid, in the PACS's order; the same object while nothing changes.
        segs: Series of segmentations by uid; as ``images``.
        told: When, in seconds since 1970.
    """

    images: Mapping[str, SeriesEntry]
    segs: Mapping[str, SeriesEntry]
    told: float


class Listing:
    """The last answer to "which series are there", and one thread at most that asks for the next.

    Args:
        fetch: Asks the PACS: image series, and segmentation series.
        path: File in which the last answer survives a restart.
        client: The PACS's connection, which knows whether it answers anything.
    """

    def __init__(
        self,
        fetch: Callable[[], tuple[list[SeriesEntry], list[SeriesEntry]]],
        *,
        path: Path,
        client: PacsClient,
    ) -> None:
        self._fetch = fetch
        self._path = path
        self._client = client
        self._changed = threading.Condition()
        self._asked = self._began = -float("inf")
        self._running: object | None = None
        self._slow = False
        self._took = 0.0
        self._error: UnavailableError | None = None
        self._snapshot = _read(path)
        self._sent: dict[str, tuple[float, SeriesEntry]] = {}

    @property
    def last(self) -> Snapshot | None:
        """The last answer, however old; None where there was none yet."""
        return self._snapshot

    def touch(self) -> None:
        """Have the PACS asked where that is due; does not wait."""
        with self._changed:
            self._ask_if_due()

    def current(self, *, patient: bool = False) -> Snapshot:
        """What the PACS holds now, or held when it answered last.

        Args:
            patient: Wait for its answer as long as it may take.

        Raises:
            UnavailableError: When it has never answered.
        """
        with self._changed:
            mine = self._ask_if_due()
        if mine is not None and patient:
            self._ended(mine, None)
        # One that waited in vain waited for all.
        elif mine is not None and not self._slow and self._client.down is None:
            self._slow = not self._arrived(mine)
        with self._changed:
            if self._snapshot is not None:
                return self._snapshot
            raise self._error or self._client.unavailable(f"no list of series within {WAIT:g} s")

    def sent(self, entry: SeriesEntry) -> None:
        """Count a segmentation that the PACS took, until it lists it or should have."""
        with self._changed:
            self._sent[entry.uid] = (time.monotonic(), entry)
            if self._snapshot is not None:
                self._snapshot = self._with_sent(self._snapshot)

    def trouble(self) -> str | None:
        """Why the last answer is not a new one; None where it is."""
        with self._changed:
            if self._error is not None:
                return self._error.reason
            late = time.monotonic() - self._began if self._running is not None else 0.0
            slow = late > max(WAIT, 3 * self._took)
            return f"no answer to the list of series for {late:.0f} s" if slow else None

    def _arrived(self, mine: object) -> bool:
        """Wait for the answer that a thread asks for, but not for a PACS that answers nothing at all."""
        until = time.monotonic() + WAIT
        if self._ended(mine, PATIENCE):
            return True
        try:
            self._client.alive(self._began)
        except UnavailableError:
            return False
        return self._ended(mine, max(0.0, until - time.monotonic()))

    def _ended(self, mine: object, seconds: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._running is not mine, seconds)

    def _ask_if_due(self) -> object | None:
        """The thread that asks, started where one is due; None where the last answer is new."""
        now = time.monotonic()
        if now - self._asked < FRESH:
            return None
        stuck = now - self._began > LONG and self._client.answered > self._began
        if self._running is None or stuck:
            self._running = token = object()
            self._began = now
            threading.Thread(target=self._refresh, args=(token,), name="pacs-list", daemon=True).start()
        return self._running

    def _refresh(self, token: object) -> None:
        began = time.monotonic()
        snapshot, error = None, None
        try:
            images, segs = self._fetch()
            snapshot = Snapshot(
                images={entry.uid: entry for entry in images},
                segs={entry.uid: entry for entry in segs},
                told=time.time(),
            )
        except UnavailableError as failure:
            error = failure
        except Exception as failure:  # whatever it is, those who wait must go on
            logger.exception("The list of series cannot be read")
            error = UnavailableError("the list of series", f"{failure}", "the server's log tells more")
        with self._changed:
            if self._running is not token:
                return
            if error is not None and self._error is None:
                logger.warning("%s", error)
            before, self._error = self._snapshot, error
            self._running, self._asked = None, began
            took = time.monotonic() - began
            self._slow = error is None and took > WAIT
            self._took = self._took if error else took
            if snapshot is not None:
                for uid in snapshot.segs:
                    self._sent.pop(uid, None)
                snapshot = self._with_sent(snapshot)
                if before is not None and _content(snapshot) == _content(before):
                    snapshot = replace(before, told=snapshot.told)  # so that it is seen to be the same
                self._snapshot = snapshot
            self._changed.notify_all()
        if snapshot is not None and (before is None or not _same(snapshot, before)):
            with suppress(OSError):
                write_atomic(self._path, json.dumps(_record(snapshot)).encode())

    def _with_sent(self, snapshot: Snapshot) -> Snapshot:
        now = time.monotonic()
        sent = {uid: entry for uid, (when, entry) in self._sent.items() if now - when < _LISTED_WITHIN}
        return replace(snapshot, segs={**snapshot.segs, **sent}) if sent else snapshot


def _content(snapshot: Snapshot) -> tuple[Mapping[str, SeriesEntry], Mapping[str, SeriesEntry]]:
    return snapshot.images, snapshot.segs


def _same(one: Snapshot, other: Snapshot) -> bool:
    return one.images is other.images and one.segs is other.segs


def _record(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "told": snapshot.told,
        "images": [entry.record() for entry in snapshot.images.values()],
        "segs": [entry.record() for entry in snapshot.segs.values()],
    }


def _read(path: Path) -> Snapshot | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        lists = [[SeriesEntry(**record) for record in found[name]] for name in ("images", "segs")]
        images, segs = ({entry.uid: entry for entry in entries} for entries in lists)
        return Snapshot(images=images, segs=segs, told=float(found["told"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s); the PACS is asked anew", path, error)
        return None
