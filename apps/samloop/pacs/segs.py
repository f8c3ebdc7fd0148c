"""Which image each segmentation of a PACS belongs to, asked once and kept on disk."""

from __future__ import annotations

import datetime
import io
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydicom

from apps.samloop.pacs.dicomweb import SeriesEntry
from sam_infer.dicom.seg import referenced_series
from sam_infer.errors import UnavailableError

#: Segmentations asked about at once; seconds until one whose headers could not be had is asked about again.
_AT_ONCE, _AGAIN = 4, 60.0
#: A request waits for what is known of this many new ones, not of an archive's thousands.
_FEW = 32
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SegFacts:
    """What is known of a series of segmentations: of its newest instance.

    Args:
        seg: Its SeriesInstanceUID.
        study: Its StudyInstanceUID.
        count: Instances that it had, None where the PACS does not tell.
        instance: SOPInstanceUID of the newest one.
        image: SeriesInstanceUID of the images that it belongs to; None where it names none.
        names: Its segments' labels.
        made: When it was made, in seconds since 1970; 0 where it does not say.
    """

    seg: str
    study: str
    count: int | None
    instance: str
    image: str | None
    names: tuple[str, ...]
    made: float

    @property
    def entry(self) -> SeriesEntry:
        """The series, as a list tells of it."""
        return SeriesEntry(uid=self.seg, study=self.study, modality="SEG", count=self.count)


class SegIndex:
    """What is known of the segmentations of a PACS.

    Args:
        ask: Gives the headers of a series' instances.
        path: File, one line a segmentation, that is only ever appended to.
    """

    def __init__(self, ask: Callable[[SeriesEntry], list[pydicom.Dataset]], *, path: Path) -> None:
        self._ask = ask
        self._path = path
        self._changed = threading.Condition()
        self._known = _read(path)
        self._failed: dict[str, float] = {}
        self._running = False
        self._settled: object = None
        #: Rises whenever something is learned.
        self.version = 0

    def get(self, entry: SeriesEntry) -> SegFacts | None:
        """What is known of a series of segmentations as it is listed; None where that is nothing yet."""
        facts = self._known.get(entry.uid)
        if facts is None or (None not in (facts.count, entry.count) and facts.count != entry.count):
            return None
        return facts

    def add(self, facts: SegFacts) -> None:
        """Keep what is known."""
        line = "\n" + json.dumps(asdict(facts))  # first, so that a line torn by a crash ends
        with self._changed:
            self._known[facts.seg] = facts
            self.version += 1
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)

    def learn(self, listed: Mapping[str, SeriesEntry], *, seconds: float | None) -> None:
        """Ask about those that are not known, in a thread.

        Args:
            listed: All segmentations, by series.
            seconds: How long to wait for a few; None waits for all of them.
        """
        while listed is not self._settled:
            unknown = [entry for entry in listed.values() if self.get(entry) is None]
            if not unknown:
                self._settled = listed
            before = time.monotonic() - _AGAIN
            new = [entry for entry in unknown if self._failed.get(entry.uid, -math.inf) <= before]
            with self._changed:
                if new and not self._running:
                    self._running = True
                    threading.Thread(target=self._learn, args=(new,), name="pacs-segs", daemon=True).start()
                if seconds is None or len(new) <= _FEW:
                    self._changed.wait_for(lambda: not self._running, seconds)
            if not new or seconds is not None:
                return

    def _learn(self, entries: list[SeriesEntry]) -> None:
        try:
            with ThreadPoolExecutor(_AT_ONCE, "pacs-seg") as pool:
                list(pool.map(self._learn_one, entries))
        finally:
            with self._changed:
                self._running = False
                self._changed.notify_all()

    def _learn_one(self, entry: SeriesEntry) -> None:
        try:
            self.add(facts_of(entry, self._ask(entry)))
        except UnavailableError as error:
            if entry.uid not in self._failed:
                logger.warning("Segmentation %s is left out: %s", entry.uid, error)
            self._failed[entry.uid] = time.monotonic()
        except Exception:
            logger.exception("Segmentation %s is left out", entry.uid)
            self._failed[entry.uid] = time.monotonic()


def facts_of(entry: SeriesEntry, headers: list[pydicom.Dataset]) -> SegFacts:
    """What the headers of a series of segmentations say of its newest instance."""
    found = [_facts(entry, header) for header in headers if header.get("Modality") == "SEG"]
    nothing = SegFacts(
        seg=entry.uid, study=entry.study, count=entry.count, instance="", image=None, names=(), made=0.0
    )
    newest = max(found, key=lambda facts: facts.made, default=nothing)
    if newest.image is None:
        logger.warning("Segmentation %s names no series of images; it is left out", entry.uid)
    return newest


def sent_facts(content: bytes) -> SegFacts:
    """What is known of a segmentation that was sent, from its file."""
    header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
    uid, study = str(header.SeriesInstanceUID), str(header.StudyInstanceUID)
    return _facts(SeriesEntry(uid=uid, study=study, modality="SEG", count=1), header)


def _facts(entry: SeriesEntry, header: pydicom.Dataset) -> SegFacts:
    segments = header.get("SegmentSequence") or ()
    return SegFacts(
        seg=entry.uid,
        study=entry.study,
        count=entry.count,
        instance=str(header.get("SOPInstanceUID", "")),
        image=referenced_series(header),
        names=tuple(str(segment.get("SegmentLabel", "")) for segment in segments),
        made=_made(header),
    )


def _made(header: pydicom.Dataset) -> float:
    """When a segmentation was made; a time without a zone is this computer's."""
    for kind in ("Content", "InstanceCreation", "Series", "Study"):
        date, clock = str(header.get(f"{kind}Date") or ""), str(header.get(f"{kind}Time") or "")
        digits = clock.partition(".")[0].ljust(6, "0")[:6]
        with suppress(ValueError, OverflowError):
            when = datetime.datetime.strptime(date + digits, "%Y%m%d%H%M%S")
            zone = str(header.get("TimezoneOffsetFromUTC") or "")
            if zone:
                when = datetime.datetime.strptime(f"{date}{digits}{zone}", "%Y%m%d%H%M%S%z")
            fraction = clock.partition(".")[2]
            return when.timestamp() + (float(f"0.{fraction}") if fraction.isdigit() else 0.0)
    return 0.0


def _read(path: Path) -> dict[str, SegFacts]:
    """The last line of each segmentation; a line that was being written at a crash is passed over."""
    known: dict[str, SegFacts] = {}
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return known
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            record: Mapping[str, Any] = json.loads(line)
            facts = SegFacts(**{**record, "names": tuple(record["names"])})
            known[facts.seg] = facts
    return known
