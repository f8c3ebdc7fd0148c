"""`samloop weights`: what checkpoints there are, fetching them, and checking them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_infer.engines.catalog import CATALOG, FOLDERS, Download, Entry, FolderEntry, Published
from sam_infer.engines.fetching import fetch
from sam_infer.engines.integrity import check
from sam_infer.engines.location import cache_folder, find, find_folder, folder_in, in_folder
from sam_infer.errors import InputError


def add_parser(commands: Any) -> None:
    """Add ``weights`` to the command line."""
    parser = commands.add_parser(
        "weights", help="list, fetch and check the engines' checkpoints", description=__doc__
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run, names, text in (
        ("list", _list, "*", "every engine, and what else can be fetched: size, licence, and where it is"),
        ("fetch", _fetch, "+", "download checkpoints; goes on where it was cut off"),
        (
            "verify",
            _verify,
            "*",
            "compare checkpoints that are there, or are named, with their SHA-256",
        ),
        ("path", _path, 1, "print where a checkpoint is"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("names", metavar="ENGINE", nargs=names, help="engine or model, as listed")
        action.add_argument(
            "--folder", type=Path, help=f"folder of the checkpoints (default {cache_folder()})"
        )
        action.set_defaults(func=run)


def _entries(args: argparse.Namespace) -> list[Entry | FolderEntry]:
    known: dict[str, Entry | FolderEntry] = {**CATALOG, **FOLDERS}
    for name in args.names:
        if name not in known:
            raise InputError("weights", name, f"choose one of {', '.join(known)}")
    return [known[name] for name in args.names or known]


def _files(entry: Entry | FolderEntry) -> tuple[Download, ...]:
    return (entry,) if isinstance(entry, Entry) else entry.files


def _paths(entry: Entry | FolderEntry, folder: Path) -> Iterator[tuple[Download, Path]]:
    return ((one, in_folder(one, folder)) for one in _files(entry))


def _folder(args: argparse.Namespace) -> Path:
    """The folder that was named, which need not exist yet, or the cache folder."""
    folder: Path = args.folder.expanduser().resolve() if args.folder else cache_folder()
    if folder.exists() and not folder.is_dir():
        raise InputError("--folder", str(folder), "is a file; name a folder")
    return folder


def _list(args: argparse.Namespace) -> int:
    for entry in _entries(args):
        folder = _folder(args)
        path = in_folder(entry, folder) if isinstance(entry, Entry) else folder_in(entry, folder)
        files = [path for _, path in _paths(entry, folder)]
        here = all(path.is_file() for path in files)
        size = sum(path.stat().st_size for path in files) if here else entry.size
        print(f"{entry.name:17}{_megabytes(size):>11}  {entry.title}")
        print(f"{'':30}{path if here else 'not here'}; {_licence(entry)}")
        if entry.note:
            print(f"{'':30}{entry.note}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    folder = _folder(args)
    for entry in _entries(args):
        print(f"{entry.name}: {_licence(entry)}; published at {entry.page}", flush=True)
        for one in _files(entry):
            with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc=one.file, disable=None) as bar:

                def report(done: int, total: int | None, bar: Any = bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                path = fetch(one, folder=folder, report=report)
            print(f"{entry.name}: {path}", flush=True)
    return 0


def _verify(args: argparse.Namespace) -> int:
    bad = 0
    files = [pair for entry in _entries(args) for pair in _paths(entry, _folder(args))]
    for one, path in files:
        if one.packaged:
            text = "comes with the package"
        elif not path.is_file():
            bad += bool(args.names)
            text = "not here"
        else:
            verdict = check(one, path)
            text = verdict.text
            if verdict.good is False:
                bad += 1
                text = f"BAD: {text}; run `samloop weights fetch {one.name}`"
        print(f"{one.name:17}{text if one.name in CATALOG else f'{path.name}: {text}'}", flush=True)
    return 1 if bad else 0


def _path(args: argparse.Namespace) -> int:
    entry, folder = _entries(args)[0], _folder(args) if args.folder else None
    print(find(entry, folder) if isinstance(entry, Entry) else find_folder(entry, folder))
    return 0


def _licence(entry: Published) -> str:
    text = f"weights {entry.licence}, code {entry.code_licence}"
    return text if entry.commercial else f"NOT FOR COMMERCIAL USE: {text}"


def _megabytes(size: int | None) -> str:
    return "? MB" if size is None else f"{size / 1e6:,.1f} MB"
