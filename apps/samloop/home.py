"""Where what belongs to some studies is kept."""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

from apps.samloop.journal import HOME
from apps.samloop.pacs.address import address_of

#: The environment variable that says where working copies of DICOMweb studies are kept; ``--data`` sets it.
DATA_DIR = "SAMLOOP_DATA_DIR"


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, which `use_data` takes."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"where models and accepted labels of DICOMweb studies are kept (default: {DATA_DIR}, or "
        "~/.local/share/samloop)",
    )


def use_data(folder: Path | None) -> None:
    """Have this process and its children keep working copies in a folder; None leaves it as it is."""
    if folder is not None:
        os.environ[DATA_DIR] = str(folder.expanduser().resolve())


def is_remote(studies: str) -> bool:
    """Whether studies are the URL of a DICOMweb server."""
    return studies.startswith(("http://", "https://"))


def home_of(studies: str) -> Path:
    """Where models, history and, for a URL, the working copy with its labels are kept.

    Beside local images; for a URL in a folder of its own under `DATA_DIR`, or where versions before kept it
    while that is the only one: in the user's cache, which people delete.
    """
    if not is_remote(studies):
        return Path(studies).expanduser().resolve() / HOME
    # Whoever asks, and with which password, it is the same PACS.
    name = hashlib.sha256(address_of(studies).url.encode()).hexdigest()[:16]
    named = os.environ.get(DATA_DIR)
    if named:
        return Path(named).expanduser().resolve() / name
    shared = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    home, before = Path(shared, "samloop", name), Path.home() / ".cache" / "samloop" / name
    return before if before.is_dir() and not home.exists() else home
