"""The folder of what a server receives and makes for a moment."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sam_infer.errors import InputError


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of this process's own, where its temporary files go from now on.

    It lies in a folder of this user in the system's place for temporary files (``TMPDIR``). What killed
    servers left there is removed: each holds a lock on its own while it lives.

    Raises:
        InputError: When somebody else made that folder.
    """
    before = tempfile.tempdir
    root = Path(tempfile.gettempdir(), f"samloop-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError("TMPDIR", str(root), "others can write there; remove it, or name another folder")
    with FileLock(root / ".lock"):
        for left in root.iterdir():
            if left.is_dir():
                _remove_left(left)
        folder = Path(tempfile.mkdtemp(dir=root))
        own = FileLock(_lock_of(folder))
        own.acquire()
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        own.release()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_left(folder: Path) -> None:
    held = FileLock(_lock_of(folder), timeout=0)
    try:
        held.acquire()
    except Timeout:
        return
    shutil.rmtree(folder, ignore_errors=True)
    _lock_of(folder).unlink(missing_ok=True)
    held.release()
