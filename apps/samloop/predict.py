"""`samloop predict`: a model run over a folder of images, label maps into another; no datastore, no server.

A run that was stopped goes on where it was. The images' folder is only read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apps.samloop.batch import Case, Entry, Job, run_batch, runnable
from apps.samloop.home import add_data_argument, home_of, use_data
from apps.samloop.project import add_engine_arguments, load_project, override
from apps.samloop.simulate import key_value
from sam_infer.errors import InputError
from sam_infer.files import atomic_writer
from sam_infer.volumes import PICTURES, extension, stem

FORMATS = (".nii.gz", ".nii", ".nrrd", ".png")


def add_parser(commands: Any) -> None:
    """Add ``predict`` to the command line."""
    parser = commands.add_parser(
        "predict", help="run a model over a folder of images", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", required=True, help="a model that needs no prompts, such as unet or sam_auto_net")
    add("--images", required=True, type=Path, metavar="DIR", help="folder of images (not its subfolders)")
    add("--out", required=True, type=Path, metavar="DIR", help="where label maps and report.json go")
    add("--studies", metavar="DIR|URL", help="whose trained models are used (default: those of --images)")
    add("--project", type=Path, help="project file (default: the one of this package)")
    add("--labels", help="names in the order of their indices from 1, as in liver,kidney")
    add_engine_arguments(parser)
    add_data_argument(parser)
    add("--format", choices=[kind[1:] for kind in FORMATS], help="default: png for pictures, else nii.gz")
    add("--param", action="append", default=[], metavar="KEY=VALUE", help="sent to the model")
    add("--restart", action="store_true", help="do all images, also those that were done before")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Predict; 0 when all is there, 1 when an image failed."""
    from apps.samloop.models import Models, cores

    use_data(args.data)
    images, out = args.images.expanduser().resolve(), args.out.expanduser().resolve()
    files = _images(images)
    if out == images:
        raise InputError("--out", str(args.out), "name another folder than that of the images")
    project = override(
        load_project(args.project),
        labels=args.labels,
        engine=args.engine,
        weights=args.weights,
        runtime=args.runtime,
    )
    home = home_of(args.studies or str(images))
    models = Models(project, home, keep_embeddings=os.access(home, os.W_OK))
    task = runnable(models.infers(), args.model)
    settings = dict(key_value("--param", text) for text in args.param)
    import torch

    torch.set_num_threads(cores())
    kinds = {path: f".{args.format}" if args.format else _kind(path) for path in files}
    job = Job(model=args.model, fingerprint=task.fingerprint(), settings={**settings, "format": args.format})

    def work(case: Case, path: Path, mark: str) -> Mapping[str, Any]:
        asked = {**settings, "image": str(path), "result_extension": kinds[path], "result_region": False}
        file, params = task.answer(asked)
        if file is not None:
            with atomic_writer(out / f"{case.name}{kinds[path]}") as writer:
                writer.writelines(file.parts)
        return params

    cases = [_case(path, out / f"{stem(path)}{kinds[path]}") for path in files]
    with tqdm(total=len(cases), unit="image") as bar:
        report = run_batch(
            cases,
            job,
            work,
            report=out / "report.json",
            restart=args.restart,
            tell=lambda now: bar.update(now["total"] - now["left"] - bar.n),
        )
    for name, entry in report["cases"].items():
        if entry["status"] == "failed":
            print(f"failed {name}: {entry['reason']}")
    counts = ", ".join(f"{report[status]} {status}" for status in ("done", "skipped", "failed"))
    print(f"{report['total']} images: {counts}; {out}")
    return 1 if report["failed"] else 0


def _images(folder: Path) -> list[Path]:
    """The image files of a folder, no two of one stem.

    Raises:
        InputError: When there is none, or the label maps of two would have one name.
    """
    if not folder.is_dir():
        raise InputError("--images", str(folder), "no such folder")
    listed = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    files = [path for path in listed if extension(path) not in ("", ".seg.nrrd")]
    if not files:
        raise InputError("--images", str(folder), "holds no image file")
    for first, second in _twins(files):
        raise InputError("--images", first.name, f"rename it, or {second.name}: their results have one name")
    return files


def _twins(files: Iterable[Path]) -> list[tuple[Path, Path]]:
    seen: dict[str, Path] = {}
    return [(path, seen[stem(path)]) for path in files if seen.setdefault(stem(path), path) != path]


def _kind(path: Path) -> str:
    return ".png" if extension(path) in PICTURES else ".nii.gz"


def _case(path: Path, result: Path) -> Case:
    def kept(_: Entry) -> bool:
        return result.is_file()

    return Case(name=stem(path), find=lambda: path, kept=kept)
