"""Whether a checkpoint file is the one that was published, or the one that was fetched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sam_infer.engines.catalog import Download
from sam_infer.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check of a file found.

    Args:
        good: True = it is the one, False = it is not, None = nothing is known to compare it with.
        text: The finding in words.
        sha256: Of the file, where it was read.
    """

    good: bool | None
    text: str
    sha256: str | None = None


def check(entry: Download, path: Path) -> Verdict:
    """Compare a checkpoint file with the catalogue, or with what was recorded when it was fetched.

    Args:
        entry: The checkpoint.
        path: An existing file.
    """
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return Verdict(good=False, text=f"has {size} bytes instead of {entry.size}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    known, where = entry.sha256, "the catalogue's SHA-256"
    if known is None and record_of(path).is_file():
        known = record_of(path).read_text("utf-8").partition(" ")[0]
        where = "the SHA-256 recorded when it was fetched"
    if known is None:
        return Verdict(good=None, text=f"SHA-256 {found}; none is known to compare with", sha256=found)
    if known == found:
        return Verdict(good=True, text=f"matches {where}", sha256=found)
    return Verdict(good=False, text=f"has SHA-256 {found}, not {where} ({known})", sha256=found)


def record(path: Path, sha256: str) -> None:
    """Write a file's hash beside it, as ``sha256sum`` does."""
    write_atomic(record_of(path), f"{sha256}  {path.name}\n".encode())


def record_of(path: Path) -> Path:
    """Where a file's hash is recorded."""
    return path.with_name(path.name + ".sha256")
