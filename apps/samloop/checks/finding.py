"""What a check looks at, and what it says."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apps.samloop.home import is_remote
from apps.samloop.project import Project

Status = Literal["ok", "warn", "fail"]
#: Bytes free on a disk below which something soon fails, and below which it is worth saying.
DISK_FAIL, DISK_WARN = 1 << 30, 10 << 30


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An installation, and what it is to serve.

    Args:
        project: The project; None where its file cannot be used.
        studies: Folder of images, or the URL of a DICOMweb server; None = nothing is said of it.
        home: Where trained models are kept, for ``studies``.
        token_file: Where the token is; None = as the environment says.
        port: Where the server listens.
    """

    project: Project | None = None
    studies: str | None = None
    home: Path | None = None
    token_file: Path | None = None
    port: int = 8000

    @property
    def remote(self) -> bool:
        """Whether the studies are in a PACS."""
        return self.studies is not None and is_remote(self.studies)

    @property
    def folder(self) -> Path | None:
        """Where images and labels are on this computer: the studies, or the working copy of a PACS."""
        if self.studies is None:
            return None
        return self.home if self.remote else Path(self.studies).expanduser().resolve()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line.

    Args:
        check: What was looked at.
        status: "fail": it does not work; "warn": it will not for long, or not well.
        text: What was found.
        remedy: What to do about it; "" where nothing needs doing.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, status="ok", text=text)


def warn(check: str, text: str, remedy: str) -> Finding:
    """Worth doing something about."""
    return Finding(check=check, status="warn", text=text, remedy=remedy)


def fail(check: str, text: str, remedy: str) -> Finding:
    """Does not work."""
    return Finding(check=check, status="fail", text=text, remedy=remedy)


def room(check: str, path: Path, what: str) -> Finding:
    """How much room is left where a path is, or would be made."""
    free = shutil.disk_usage(existing(path)).free
    text = f"{gigabytes(free)} free for {what} ({path})"
    if free < DISK_FAIL:
        return fail(check, text, "make room, or choose another place: what is saved next will not fit")
    if free < DISK_WARN:
        return warn(check, text, "make room soon: volumes, embeddings and histories of labels grow")
    return ok(check, text)


def existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def gigabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / (1 << 30):.1f} GB"


def few(names: list[str], most: int = 3) -> str:
    """Some names of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
