"""What lies in the folders of a store: image files by id."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from apps.samloop.incoming import is_id
from sam_infer.volumes import extension, stem

logger = logging.getLogger(__name__)


#: Names whose parts are remembered: those of a folder are looked at again and again.
_NAMES = 1 << 16
is_name = lru_cache(_NAMES)(is_id)


@lru_cache(_NAMES)
def split_name(name: str) -> tuple[str, str] | None:
    """Id and extension, in its own capitals, of an image file's name; None where it is no such name."""
    if name.startswith(".") or not extension(name):
        return None
    return stem(name), name[len(stem(name)) :]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A file as it is now.

    Args:
        ext: Its name behind the id, in its own capitals.
        size: Bytes.
        mtime_ns: When it was written, nanoseconds since 1970.
    """

    ext: str
    size: int
    mtime_ns: int


class StudyFiles:
    """Lists folders; what cannot be served is named in the log, once.

    Args:
        root: The studies folder, without links in its path.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._told: set[str] = set()

    def images(self, folder: Path) -> dict[str, list[Seen]]:
        """Image files by id, the newest first; links may lead anywhere, nothing is written through them."""
        found = self._listed(folder, outside=True)
        for name, files in found.items():
            if len(files) > 1:
                newest, second = (f"{name}{seen.ext}" for seen in files[:2])
                self._tell(folder / second, f"{newest} has the same id and is newer")
        return found

    def labels(self, folder: Path) -> dict[str, list[Seen]]:
        """Label files by id, the newest first; no links out of the studies folder."""
        return self._listed(folder, outside=False)

    def is_inside(self, path: Path) -> bool:
        """Whether what a path leads to lies in the studies folder."""
        return Path(os.path.realpath(path)).is_relative_to(self._root)

    def _listed(self, folder: Path, *, outside: bool) -> dict[str, list[Seen]]:
        found: dict[str, list[Seen]] = {}
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                split = split_name(entry.name)
                if split is None:
                    continue
                try:
                    if not entry.is_file():
                        continue
                    stat = entry.stat()
                except FileNotFoundError:  # gone since it was listed
                    continue
                name, ext = split
                if not is_name(name):
                    self._tell(folder / entry.name, "its name cannot be an id, rename it")
                elif not outside and entry.is_symlink() and not self.is_inside(folder / entry.name):
                    self._tell(folder / entry.name, "a link that leads out of the studies folder")
                else:
                    seen = Seen(ext=ext, size=stat.st_size, mtime_ns=stat.st_mtime_ns)
                    found.setdefault(name, []).append(seen)
        for files in found.values():
            files.sort(key=lambda seen: -seen.mtime_ns)
        return found

    def _tell(self, file: Path, reason: str) -> None:
        if str(file) not in self._told:
            self._told.add(str(file))
            logger.warning("Not served: %s (%s)", file, reason)
