"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A name beside ``target`` for a file that is to be moved onto it; what has it at the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def place(temporary: Path, target: Path) -> None:
    """Move a synced file onto ``target`` in the same folder; it is there after a power cut too."""
    temporary.replace(target)
    sync(target.parent)


@contextmanager
def synced_writer(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is on the disk at the end."""
    with path.open("wb") as writer:
        yield writer
        writer.flush()
        os.fsync(writer.fileno())


@contextmanager
def atomic_writer(target: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name beside it; on success it is synced and moved into place."""
    with staged(target) as temporary:
        with synced_writer(temporary) as writer:
            yield writer
        place(temporary, target)


def sweep(folder: Path, *, folders: bool = False) -> None:
    """Remove the temporary files, older than an hour, that killed writers left in a folder.

    Args:
        folder: Where to look.
        folders: Remove temporary folders instead of files.
    """
    for left in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if left.stat().st_mtime >= time.time() - 3600 or left.is_dir() != folders:
                continue
            if folders:
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def write_atomic(target: Path, content: bytes) -> None:
    """Write ``content`` to ``target``, whole or not at all."""
    with atomic_writer(target) as writer:
        writer.write(content)


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file to ``target``, whole or not at all."""
    with source.open("rb") as reader, atomic_writer(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str | None:
    """Hex digest of a file's content; None where there is no file."""
    try:
        with path.open("rb") as reader:
            return hashlib.file_digest(reader, "sha256").hexdigest()
    except FileNotFoundError:
        return None
