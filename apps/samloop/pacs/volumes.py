"""Series of the PACS as volumes: fetched, read, and fetched anew when they have changed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from apps.samloop.pacs.dicomweb import Dicomweb, SeriesEntry
from apps.samloop.pacs.files import SeriesFiles
from apps.samloop.pacs.refusals import NoVolumeError, Refusals
from sam_infer.dicom.series import Series, read_series
from sam_infer.errors import InputError, UnavailableError

#: Seconds until the PACS is asked again whether a series still has the same instances.
AGAIN = 60.0


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What is noted of the series that an image was made from.

    Args:
        count: Number of instances.
        digest: Of their SOPInstanceUIDs.
        when: Seconds since 1970.
    """

    count: int
    digest: str
    when: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"instances": self.count, "instances_sha256": self.digest, "fetched": self.when}

    def same(self, note: Mapping[str, Any]) -> bool:
        """Whether they are the instances that `record` noted."""
        return bool(note.get("instances_sha256") == self.digest)


def fetched_of(instances: Iterable[str]) -> Fetched:
    """What is told of instances that were fetched now."""
    uids = sorted(instances)
    digest = hashlib.sha256("\n".join(uids).encode()).hexdigest()
    return Fetched(count=len(uids), digest=digest, when=time.time())


class Volumes:
    """Fetches series and reads them.

    Args:
        pacs: Where they come from.
        refusals: Where it is noted that one is no volume.
        files: Where the files of series are kept.
    """

    def __init__(self, pacs: Dicomweb, refusals: Refusals, files: SeriesFiles) -> None:
        self._pacs = pacs
        self._refusals = refusals
        self._files = files
        self._compared: dict[str, float] = {}

    def check(self, entry: SeriesEntry) -> None:
        """Refuse a series that was found to be no volume.

        Raises:
            NoVolumeError: When it was.
        """
        reason = self._refusals.reason(entry)
        if reason is not None:
            raise NoVolumeError(entry.uid, reason)

    def changed(self, entry: SeriesEntry, note: Mapping[str, Any], *, told: float) -> bool:
        """Whether the PACS has other instances of a series than its image was made from.

        Args:
            entry: The series as it is listed.
            note: Of its image, as `Fetched.record` wrote it.
            told: When the list was told, in seconds since 1970.
        """
        newer = told > float(note.get("fetched") or 0.0)
        if newer and entry.count is not None and entry.count != note.get("instances"):
            return True
        now = time.monotonic()
        if now - self._compared.get(entry.uid, -AGAIN) < AGAIN:
            return False
        try:
            listed = self._pacs.instances(entry)
        except UnavailableError:
            return False
        if listed and not fetched_of(listed).same(note):
            return True
        self._compared[entry.uid] = now
        return False

    def fetch(self, entry: SeriesEntry) -> tuple[Series, Fetched]:
        """A series as the PACS has it now; within `SeriesFiles.locked`.

        Raises:
            NoVolumeError: When it is none; that is remembered.
            UnavailableError: When the PACS does not answer.
        """
        listed = self._pacs.instances(entry)
        if not listed or self._files.instances(entry.uid) != listed:
            self._files.fetch(entry, listed)
        self._compared[entry.uid] = time.monotonic()
        return self._read(entry), fetched_of(self._files.instances(entry.uid))

    def series(self, entry: SeriesEntry) -> Series:
        """The series that an image was made from; its files are fetched again where they were removed.

        Raises:
            NoVolumeError: See `fetch`.
            UnavailableError: See `fetch`.
        """
        with self._files.locked(entry.uid):
            if self._files.there(entry.uid) is None:
                self._files.fetch(entry, self._pacs.instances(entry))
            return self._read(entry)

    def _read(self, entry: SeriesEntry) -> Series:
        folder = self._files.there(entry.uid)
        assert folder is not None
        try:
            return read_series(folder)
        except InputError as error:
            reason = str(error).partition(": ")[2]
            self._refusals.add(entry, reason)
            self._files.remove(entry.uid)
            raise NoVolumeError(entry.uid, reason) from error
