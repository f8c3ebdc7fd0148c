"""What a click costs, samloop beside MONAI Label's own SAM 2 task, over HTTP on this machine.

python -m bench latency --out results --engines bundled,sam2.1_tiny --sizes 256x256x100,512x512x200

It makes the volumes, starts the servers, clicks, stops them, and prints a table. SAM 2 runs with random
parameters, the same in both servers: they change what is found, not how long it takes. MONAI Label runs its
sample app "radiology" as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from bench import clicks, servers
from bench.proc import cpu_name
from bench.table import markdown
from sam_infer.engines.registry import entry_of

STOCK = "MONAI Label sam_2d"
#: The network that both servers run.
COMPARED = "sam2.1_tiny"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table: a server, a volume size, and the encoding of its masks."""

    server: str
    shape: tuple[int, int, int]
    compress: bool
    start: float
    waits: clicks.Waits


def add_parser(commands: Any) -> None:
    """Add ``latency`` to the command line."""
    parser = commands.add_parser("latency", help="what a click costs, beside MONAI Label's own SAM 2 task")
    parser.add_argument("--out", type=Path, required=True, help="folder for latency.md, latency.json, logs")
    parser.add_argument("--engines", default=f"bundled,{COMPARED}", help="engines of samloop")
    parser.add_argument("--sizes", default="256x256x100,512x512x200", help="volumes, in voxels")
    parser.add_argument("--ct", type=Path, help="CT volume that is resampled to the sizes; else a phantom")
    parser.add_argument("--clicks", type=int, default=10, help="clicks of each kind")
    parser.add_argument("--stock-clicks", type=int, default=3, help="the same of MONAI Label; 0: without it")
    parser.add_argument("--users", type=int, default=8, help="users at once")
    parser.add_argument("--runtime", default="auto", help="samloop serve --runtime, where an engine has any")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write it."""
    args.out.mkdir(parents=True, exist_ok=True)
    shapes = [_shape(size) for size in args.sizes.split(",")]
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="samloop-bench-") as name:
        folder = Path(name)
        for shape in shapes:
            write_volume(args.ct, shape, folder / "volumes" / f"{_image(shape)}.nii.gz")
        for engine in args.engines.split(","):
            studies = folder / engine
            shutil.copytree(folder / "volumes", studies)
            arguments = ["--engine", engine, *_weights(engine, folder)]
            if entry_of(engine).family == "sam":
                arguments += ["--runtime", args.runtime]
            with servers.samloop(studies, args.out / f"{engine}.log", arguments) as server:
                volume = "sam_click_3d" if entry_of(engine).packaged else None
                results += _clicked(f"samloop {engine}", server, shapes, args, "sam_click_2d", volume)
        if args.stock_clicks:
            studies = folder / "stock"
            shutil.copytree(folder / "volumes", studies)
            checkpoint, config = _random_sam2(folder)
            log = args.out / "monailabel.log"
            with servers.stock(studies, folder / "app", log, checkpoint, config) as server:
                args.clicks = args.stock_clicks
                results += _clicked(STOCK, server, shapes, args, "sam_2d", None)
    text = f"{table(results)}\n{ratios(results)}\n{cpu_name()}\n"
    print(text, end="")
    (args.out / "latency.md").write_text(text)
    rows = [
        {**vars(r), "waits": vars(r.waits), "summary": clicks.summary(r.waits), "cpu": cpu_name()}
        for r in results
    ]
    (args.out / "latency.json").write_text(json.dumps(rows, indent=1))
    return 0


def table(results: list[Result]) -> str:
    """Seconds waited, p50 / p95, as a markdown table."""
    head = ["server", "volume", "mask", "first click of all", "click on a new slice", "repeated click"]
    head += ["3D propagation", "users at once", "slowest /info/", "memory GB (peak)"]
    rows = []
    for result in results:
        waits, found = result.waits, clicks.summary(result.waits)
        rows.append(
            [
                result.server,
                "x".join(map(str, result.shape)),
                "gzip" if result.compress else "raw",
                f"{waits.opened:.2f}",
                *(_both(found[kind]) for kind in ("new_slice", "repeated", "volume", "crowd")),
                f"{max(waits.info):.3f}",
                f"{waits.memory / 1e9:.2f} ({waits.peak_memory / 1e9:.2f})",
            ]
        )
    return markdown(head, rows)


def ratios(results: list[Result]) -> str:
    """How many times faster samloop answers than MONAI Label, at p50; nothing where that was left out."""
    stock = {(r.shape, r.compress): r.waits for r in results if r.server == STOCK}
    rows = []
    for result in results:
        base = stock.get((result.shape, result.compress))
        if base is None or result.server == STOCK:
            continue
        pairs = [
            (getattr(base, kind), getattr(result.waits, kind)) for kind in ("new_slice", "repeated", "crowd")
        ]
        times = [f"{np.median(theirs) / np.median(ours):.0f}x" for theirs, ours in pairs]
        times.append(f"{max(base.info) / max(result.waits.info):.0f}x")
        encoding = "gzip" if result.compress else "raw"
        rows.append([result.server, "x".join(map(str, result.shape)), encoding, *times])
    if not rows:
        return ""
    head = [
        "times faster than MONAI Label sam_2d",
        "volume",
        "mask",
        "new slice",
        "repeated",
        "users at once",
    ]
    return markdown([*head, "slowest /info/"], rows)


def write_volume(source: Path | None, shape: tuple[int, int, int], target: Path) -> None:
    """Resample a CT, or a phantom, linearly to a shape and write it as int16 NIfTI."""
    if source is not None:
        image = nib.Nifti1Image.from_filename(source)
        array, affine = np.asanyarray(image.dataobj).astype(np.float32), image.affine
    else:
        from trainers.phantoms import make_phantom

        made, _, affine = make_phantom(0, (96, 96, 48))
        array = made.astype(np.float32)
    factors = [n / o for n, o in zip(shape, array.shape, strict=True)]
    resampled = ndimage.zoom(array, factors, order=1).astype(np.int16)
    target.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(resampled, affine @ np.diag([*(1 / f for f in factors), 1.0])), target)


def _clicked(
    name: str,
    server: servers.Server,
    shapes: list[tuple[int, int, int]],
    args: argparse.Namespace,
    model: str,
    volume_model: str | None,
) -> list[Result]:
    results = []
    for shape in shapes:
        for compress in (True, False):
            plan = clicks.Plan(
                image=_image(shape),
                shape=shape,
                model=model,
                volume_model=volume_model,
                clicks=args.clicks,
                users=args.users,
                compress=compress,
            )
            waits = clicks.measure(server, plan, seed=int(compress))
            results.append(
                Result(server=name, shape=shape, compress=compress, start=server.start, waits=waits)
            )
            print(f"{name}, {shape}, {'gzip' if compress else 'raw'}: measured", flush=True)
    return results


def _weights(engine: str, folder: Path) -> list[str]:
    """What the command line says of an engine's weights: random ones for the compared network."""
    return ["--weights", str(_random_sam2(folder)[0])] if engine == COMPARED else []


def _random_sam2(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of random parameters in sam2's format, made once, and its configuration file."""
    import sam2
    import torch

    from sam_infer.engines.sam2model import VARIANTS, build_sam2

    config = Path(sam2.__path__[0], "configs", "sam2.1", f"{VARIANTS[COMPARED].config}.yaml")
    path = folder / "sam2.1_hiera_tiny.pt"
    if not path.exists():
        torch.manual_seed(0)
        torch.save({"model": build_sam2(COMPARED).state_dict()}, path)
    return path, config


def _shape(size: str) -> tuple[int, int, int]:
    i, j, k = (int(n) for n in size.split("x"))
    return i, j, k


def _image(shape: tuple[int, int, int]) -> str:
    return "ct_" + "x".join(map(str, shape))


def _both(found: dict[str, float] | None) -> str:
    return f"{found['p50']:.3f} / {found['p95']:.3f}" if found else "-"
