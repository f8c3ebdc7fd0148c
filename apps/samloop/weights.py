"""`samloop weights`: what checkpoints there are, fetching them, and checking them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_infer.engines.catalog import CATALOG, Entry
from sam_infer.engines.fetching import fetch
from sam_infer.engines.integrity import check
from sam_infer.engines.location import cache_folder, find, in_folder
from sam_infer.engines.registry import entry_of
from sam_infer.errors import InputError


def add_parser(commands: Any) -> None:
    """Add ``weights`` to the command line."""
    parser = commands.add_parser(
        "weights", help="list, fetch and check the engines' checkpoints", description=__doc__
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run, names, text in (
        ("list", _list, "*", "every engine: size, licence, and where its checkpoint is"),
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
        action.add_argument("names", metavar="ENGINE", nargs=names, help="engine, as listed")
        action.add_argument(
            "--folder", type=Path, help=f"folder of the checkpoints (default {cache_folder()})"
        )
        action.set_defaults(func=run)


def _entries(args: argparse.Namespace) -> list[Entry]:
    return [entry_of(name) for name in args.names or CATALOG]


def _folder(args: argparse.Namespace) -> Path:
    """The folder that was named, which need not exist yet, or the cache folder."""
    folder: Path = args.folder.expanduser().resolve() if args.folder else cache_folder()
    if folder.exists() and not folder.is_dir():
        raise InputError("--folder", str(folder), "is a file; name a folder")
    return folder


def _list(args: argparse.Namespace) -> int:
    for entry in _entries(args):
        path = in_folder(entry, _folder(args))
        here = path.is_file()
        print(f"{entry.name:17}{_megabytes(path.stat().st_size if here else entry.size):>11}  {entry.title}")
        print(f"{'':30}{path if here else 'not here'}; {_licence(entry)}")
        if entry.note:
            print(f"{'':30}{entry.note}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    folder = _folder(args)
    for entry in _entries(args):
        print(f"{entry.name}: {_licence(entry)}; published at {entry.page}", flush=True)
        with tqdm(unit="B", unit_scale=True, unit_divisor=1000, desc=entry.file, disable=None) as bar:

            def report(done: int, total: int | None, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            path = fetch(entry, folder=folder, report=report)
        print(f"{entry.name}: {path}", flush=True)
    return 0


def _verify(args: argparse.Namespace) -> int:
    bad = 0
    for entry in _entries(args):
        path = in_folder(entry, _folder(args))
        if entry.packaged:
            text = "comes with the package"
        elif not path.is_file():
            bad += bool(args.names)
            text = "not here"
        else:
            verdict = check(entry, path)
            text = verdict.text
            if verdict.good is False:
                bad += 1
                text = f"BAD: {text}; run `samloop weights fetch {entry.name}`"
        print(f"{entry.name:17}{text}", flush=True)
    return 1 if bad else 0


def _path(args: argparse.Namespace) -> int:
    print(find(_entries(args)[0], _folder(args) if args.folder else None))
    return 0


def _licence(entry: Entry) -> str:
    text = f"weights {entry.licence}, code {entry.code_licence}"
    return text if entry.commercial else f"NOT FOR COMMERCIAL USE: {text}"


def _megabytes(size: int | None) -> str:
    return "? MB" if size is None else f"{size / 1e6:,.1f} MB"
