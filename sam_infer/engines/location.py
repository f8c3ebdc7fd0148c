"""Where checkpoint files lie: given by the user, packaged, or in the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from sam_infer.engines.catalog import PACKAGED, Entry
from sam_infer.errors import InputError

#: Environment variable that names the cache folder.
VARIABLE = "SAMLOOP_WEIGHTS"


def cache_folder() -> Path:
    """The folder of fetched checkpoints: ``$SAMLOOP_WEIGHTS``, or ``~/.cache/samloop/weights``."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "samloop" / "weights"


def place(entry: Entry, given: Path | None = None) -> Path:
    """Where an entry's checkpoint is looked for, present or not.

    Args:
        entry: The engine.
        given: The user's file, or a folder that holds it under the catalogue's name; None = the package or
            the cache folder.
    """
    if given is not None:
        return given / entry.file if given.is_dir() else given
    return (PACKAGED if entry.packaged else cache_folder()) / entry.file


def find(entry: Entry, given: Path | None = None) -> Path:
    """The checkpoint file of an entry.

    Args:
        entry: The engine.
        given: As in `place`.

    Raises:
        InputError: When there is none, or the cache holds a part of one; the text says how to get it.
    """
    path = place(entry, given)
    if not path.is_file():
        raise InputError(
            "weights", str(path), f"{entry.name} needs this file, which is not there; {how_to_get(entry)}"
        )
    if given is None and entry.size is not None and path.stat().st_size != entry.size:
        raise InputError(
            "weights",
            str(path),
            f"has {path.stat().st_size} bytes instead of {entry.size}; {how_to_get(entry)}",
        )
    return path


def how_to_get(entry: Entry) -> str:
    """What to do where a checkpoint is missing, with and without a network."""
    if entry.packaged:
        return "it comes with the package; install samloop again"
    return (
        f"run `samloop weights fetch {entry.name}`, or download {entry.addresses[0]} on another computer "
        f"and put it into {cache_folder()} as {entry.file}, or name the file with --weights or engine.weights"
    )
