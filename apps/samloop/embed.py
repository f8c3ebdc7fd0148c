"""`samloop embed`: the slices of a folder encoded beforehand, into the cache that the server reads.

What is there already is found again, so a run that was stopped goes on where it was. A server sees the same
slices where it serves the same folder with the same engine, weights, runtime and windows.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apps.samloop.project import add_engine_arguments, load_project, override
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.volumes import extension

#: Bytes that a file holds beside its tensors, at most.
_HEADER = 4 << 10


def add_parser(commands: Any) -> None:
    """Add ``embed`` to the command line."""
    parser = commands.add_parser(
        "embed", help="encode a folder's slices beforehand", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--studies", required=True, type=Path, help="folder of images")
    parser.add_argument("--project", type=Path, help="project file (default: the one of this package)")
    add_engine_arguments(parser)
    parser.add_argument(
        "--partial", action="store_true", help="encode as many slices as fit where not all of them do"
    )
    parser.set_defaults(func=run)


@dataclass(kw_only=True)
class _Tally:
    encoded: int = 0
    found: int = 0
    kept: int = 0
    skipped: dict[Path, str] = field(default_factory=dict)
    end: str = ""


def run(args: argparse.Namespace) -> int:
    """Encode; 0 when all is there, 1 when something is not, 130 when it was interrupted."""
    from apps.samloop.home import home_of
    from apps.samloop.models import cores, embedding_store

    begin = time.perf_counter()
    project = override(
        load_project(args.project), engine=args.engine, weights=args.weights, runtime=args.runtime
    )
    folder = args.studies.expanduser().resolve()
    if not folder.is_dir():
        raise InputError("--studies", str(args.studies), "no such folder")
    store = embedding_store(project, home_of(str(folder)))
    if store is None:
        raise InputError("limits.embeddings_disk_mb", 0, "no embeddings are kept on disk; raise it")
    engine = create_engine(project.engine, **project.engine_options)
    if engine.encoding is None:
        raise InputError(
            "engine", project.engine, "it has nothing to encode beforehand; name another with --engine"
        )
    import torch

    torch.set_num_threads(cores())
    encoder = SliceEncoder(engine=engine, store=store, embedding_bytes=0)
    library = ImageLibrary(limit=project.volumes_mb << 20, ct=project.ct, other=project.other)
    tally, images = _Tally(), {}
    code = 130
    try:
        images = _readable(folder, library, tally)
        _encode(images, encoder, library, tally, partial=args.partial)
        code = 1 if tally.skipped or tally.end else 0
    except KeyboardInterrupt:
        tally.end = "interrupted; start it again to go on"
    for path, reason in tally.skipped.items():
        print(f"skipped {path.name}: {reason}")
    print(
        f"{len(images)} images, {sum(images.values())} slices: {tally.encoded} encoded, {tally.found} found, "
        f"{len(tally.skipped)} images skipped; {store.nbytes() / 2**20:.0f} MB in {store.folder}; "
        f"{time.perf_counter() - begin:.0f} s{f'; {tally.end}' if tally.end else ''}"
    )
    return code


def _readable(folder: Path, library: ImageLibrary, tally: _Tally) -> dict[Path, int]:
    """The number of slices of each image that can be read."""
    images = {}
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    for path in tqdm([p for p in files if extension(p) not in ("", ".seg.nrrd")], "reading", unit="image"):
        try:
            images[path] = library.read(path).shape[2]
        except InputError as error:
            tally.skipped[path] = str(error)
    return images


def _encode(
    images: dict[Path, int], encoder: SliceEncoder, library: ImageLibrary, tally: _Tally, *, partial: bool
) -> None:
    total = sum(images.values())
    assert encoder.store is not None
    with tqdm(total=total, desc="encoding", unit="slice") as bar:
        for path, count in images.items():
            try:
                image = library.read(path)
            except InputError as error:  # it was there a moment ago
                tally.skipped[path] = str(error)
                continue
            window = library.window_for(image, {})
            for k in range(count):
                packed, found = encoder.packed(image, k, window)
                if encoder.store.failing:
                    tally.end = "the disk takes no more"
                    return
                if not tally.kept and not partial:
                    _check_room(total, packed.nbytes, encoder)
                tally.kept += packed.nbytes + _HEADER
                tally.found += found
                tally.encoded += not found
                bar.update()
                if (
                    tally.kept + packed.nbytes + _HEADER > encoder.store.limit
                    and tally.found + tally.encoded < total
                ):
                    tally.end = "no more fit into limits.embeddings_disk_mb"
                    return


def _check_room(total: int, each: int, encoder: SliceEncoder) -> None:
    """Refuse where not all slices fit; one was encoded to know what it takes."""
    store = encoder.store
    assert store is not None
    needed = total * (each + _HEADER)
    remedy = f"{total} slices need about {(needed >> 20) + 1} MB"
    if needed > store.limit:
        raise InputError(
            "limits.embeddings_disk_mb",
            store.limit >> 20,
            f"{remedy}; raise it in the project file, or add --partial to encode as many as fit",
        )
    free = shutil.disk_usage(store.folder).free + store.nbytes() - store.reserve
    if needed > free:
        raise InputError(
            "--studies",
            str(store.folder),
            f"{remedy}, the disk has {max(free, 0) >> 20} MB for them; free some, or add --partial",
        )
