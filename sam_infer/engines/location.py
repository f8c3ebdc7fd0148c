"""Where checkpoint files lie: given by the user, packaged, or in the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from sam_infer.engines.catalog import PACKAGED, Download, FolderEntry
from sam_infer.errors import InputError

#: Environment variable that names the cache folder.
VARIABLE = "SAMLOOP_WEIGHTS"


def cache_folder() -> Path:
    """The folder of fetched checkpoints: ``$SAMLOOP_WEIGHTS``, or ``~/.cache/samloop/weights``."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "samloop" / "weights"


def place(entry: Download, given: Path | None = None) -> Path:
    """Where an entry's checkpoint is looked for, present or not.

    Args:
        entry: The engine.
        given: The user's file, or a folder of files under the catalogue's names; None = the cache folder.
    """
    if given is not None and not given.is_dir():
        return given
    return in_folder(entry, given or cache_folder())


def in_folder(entry: Download, folder: Path) -> Path:
    """Where an entry's checkpoint is looked for in a folder; packaged weights lie in the package besides."""
    inside = folder / entry.file
    return PACKAGED / entry.file if entry.packaged and not inside.is_file() else inside


def find(entry: Download, given: Path | None = None) -> Path:
    """The checkpoint file of an entry.

    Args:
        entry: The engine.
        given: As in `place`.

    Raises:
        InputError: When there is none, or a part of one; the text says how to get it.
    """
    path = place(entry, given)
    if not path.is_file():
        if entry.packaged and path == given:
            remedy = "name a file that is there, or none for the packaged one"
        elif entry.packaged:
            remedy = "it comes with the package; install samloop again"
        elif path == given:
            remedy = (
                "name a checkpoint file or a folder of them that is there, or leave it out and "
                f"{_remedy(entry, cache_folder())}"
            )
        else:
            remedy = _remedy(entry, path.parent)
        raise InputError("weights", str(path), f"{entry.name} needs this file, which is not there; {remedy}")
    size = path.stat().st_size
    if path != given and entry.size not in (None, size):
        raise InputError(
            "weights",
            str(path),
            f"has {size} bytes instead of {entry.size}; run {_command(entry.name, path.parent)}, or name "
            "the file itself with --weights if it is one of your own",
        )
    return path


def folder_in(entry: FolderEntry, folder: Path | None = None) -> Path:
    """Where the files of a model of several are looked for; ``folder`` as in `find_folder`."""
    return (folder or cache_folder()) / entry.name


def find_folder(entry: FolderEntry, folder: Path | None = None) -> Path:
    """The folder of a model of several files.

    Args:
        entry: The model.
        folder: The folder of checkpoints in which its own lies; None = the cache folder.

    Raises:
        InputError: When a file of it is missing; the text says how to get it.
    """
    base = folder or cache_folder()
    for one in entry.files:
        path = in_folder(one, base)
        if not path.is_file() or one.size not in (None, path.stat().st_size):
            what = f"needs this file, which is not there, or not whole; {_remedy(one, base)}"
            raise InputError("weights", str(path), f"{entry.name} {what}")
    return folder_in(entry, folder)


def _remedy(entry: Download, folder: Path) -> str:
    """How to get a file into a folder of checkpoints, with and without a network."""
    return f"run {_command(entry.name, folder)}, or {by_hand(entry, in_folder(entry, folder))}"


def _command(name: str, folder: Path) -> str:
    """The command that fetches a checkpoint into a folder."""
    option = "" if folder == cache_folder() else f" --folder {folder}"
    return f"`samloop weights fetch {name}{option}`"


def by_hand(entry: Download, target: Path) -> str:
    """How to bring a file to its place on a computer without a network."""
    return (
        f"download {entry.addresses[0]} on another computer and put it into {target.parent} as "
        f"{target.name}, or {entry.named}"
    )
