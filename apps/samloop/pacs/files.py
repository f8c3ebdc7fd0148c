"""The files of series, as the PACS has them stored, in a folder from which they can be fetched again."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from apps.samloop.pacs.dicomweb import Dicomweb, SeriesEntry
from sam_infer.files import sweep, sync


class SeriesFiles:
    """Fetches the files of a series once; they stay for the headers that a segmentation repeats.

    Args:
        pacs: Where they are fetched from.
        folder: Where they go, a folder a series.
    """

    def __init__(self, pacs: Dicomweb, folder: Path) -> None:
        self._pacs = pacs
        self._folder = folder
        sweep(folder, folders=True)

    @contextmanager
    def locked(self, uid: str) -> Iterator[None]:
        """Alone with a series among threads and processes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self._folder / f".{uid}.lock")):
            yield

    def there(self, uid: str) -> Path | None:
        """The folder of a series that was fetched."""
        folder = self._folder / uid
        return folder if folder.is_dir() else None

    def instances(self, uid: str) -> set[str]:
        """SOPInstanceUIDs of what was fetched of a series."""
        folder = self.there(uid)
        return {path.stem for path in folder.iterdir()} if folder is not None else set()

    def fetch(self, entry: SeriesEntry, listed: set[str]) -> None:
        """Fetch a series, whole or not at all; within `locked`.

        Args:
            entry: The series.
            listed: SOPInstanceUIDs that it has at least.

        Raises:
            UnavailableError: When the PACS does not answer, or not with the whole series.
        """
        with self.scratch(entry.uid) as scratch:
            self._pacs.download(entry, scratch)
            missing = listed - {path.stem for path in scratch.iterdir()}
            if missing:
                raise self._pacs.client.unavailable(
                    f"it sent {len(listed) - len(missing)} of {len(listed)} files of series {entry.uid}"
                )
            for path in scratch.iterdir():
                sync(path)
            target = self._folder / entry.uid
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        sync(self._folder)

    @contextmanager
    def scratch(self, uid: str) -> Iterator[Path]:
        """A folder for files that are on their way; what is still in it at the end is removed."""
        scratch = self._folder / f".{uid}.{os.getpid()}.{threading.get_ident()}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove(self, uid: str) -> None:
        """Remove the files of a series; they can be fetched again."""
        shutil.rmtree(self._folder / uid, ignore_errors=True)
