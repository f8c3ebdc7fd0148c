"""One box on the middle slice -> 3D Dice: how far a single prompt carries through a volume.

python -m bench propagation --data ct_totalseg_examples --organs liver,spleen,aorta --out results
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nibabel.affines import voxel_sizes

from sam_infer.click import click_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.registry import NAMES, create_engine
from sam_infer.geometry import tight_box
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary
from sam_infer.prompts.request import parse_clicks
from sam_infer.types import BoolArray
from sam_infer.volumes import Image, read_labelmap

ORGANS = "liver,spleen,kidney_right,kidney_left,aorta"
CT = Window(level=40, width=400)


def add_parser(commands: Any) -> None:
    """Add ``propagation`` to the command line."""
    parser = commands.add_parser("propagation", help="3D Dice of one box on the middle slice")
    parser.add_argument("--data", type=Path, required=True, help="folder with images/, labels/, labels.json")
    parser.add_argument("--organs", default=ORGANS, help="names in labels.json")
    parser.add_argument("--engine", default="bundled", choices=NAMES)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for table.json and the pictures")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write it and a picture for each volume."""
    names = json.loads((args.data / "labels.json").read_text())
    encoder = SliceEncoder(engine=create_engine(args.engine, weights=args.weights))
    library = ImageLibrary(limit=1 << 30, ct=CT)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in sorted((args.data / "images").glob("*.nii.gz")):
        stem = path.name.removesuffix(".nii.gz")
        image = library.read(path)
        label = read_labelmap(args.data / "labels" / path.name, image)
        indices = {name: int(index) for index, (name, _) in names[stem].items()}
        pictures = []
        for organ in args.organs.split(","):
            truth = label == indices.get(organ, -1)
            if truth.sum() < 50:
                continue
            row, mask = _measure(image, truth, encoder, library)
            rows.append({"volume": stem, "organ": organ, **row})
            pictures.append((organ, row, mask, truth))
            shown = [
                stem,
                organ,
                f"{row['dice3d']:.3f}",
                f"{row['dice_slice']:.3f}",
                row["extent"],
                row["found"],
            ]
            print("|", " | ".join([*shown, f"{row['seconds']:.2f} s", row["stops"]]), "|", flush=True)
        if pictures:
            _picture(image, library.window_for(image, {}), pictures, args.out / f"{stem}.png")
    mean = float(np.mean([row["dice3d"] for row in rows]))
    print(f"mean 3D Dice over {len(rows)} objects: {mean:.3f}")
    (args.out / "table.json").write_text(json.dumps({"mean": mean, "rows": rows}, indent=1))
    return 0


def _measure(
    image: Image, truth: BoolArray, encoder: SliceEncoder, library: ImageLibrary
) -> tuple[dict[str, Any], BoolArray]:
    """Prompt the middle slice of the object's extent with its tight box and propagate."""
    extent = np.flatnonzero(truth.any(axis=(0, 1)))
    k = int(extent[len(extent) // 2])
    box = tight_box(truth[:, :, k].T)
    assert box is not None
    request = {"roi": [box[0], box[2], box[1], box[3], k, k]}
    start = time.perf_counter()
    found = click_volume(
        image,
        parse_clicks(request, image.shape),
        encoder=encoder,
        window=library.window_for(image, request),
        mark=lambda _: None,
    )
    seconds = time.perf_counter() - start
    mask = found.labelmap.astype(bool)
    slices = np.flatnonzero(mask.any(axis=(0, 1)))
    return {
        "dice3d": _dice(mask, truth),
        "dice_slice": _dice(mask[:, :, k], truth[:, :, k]),
        "k": k,
        "extent": f"{extent[0]}-{extent[-1]}",
        "found": f"{slices[0]}-{slices[-1]}" if len(slices) else "none",
        "stops": ", ".join(f"{n}: {why}" for n, why in sorted(found.stops.items())),
        "seconds": round(seconds, 3),
    }, mask


def _dice(a: BoolArray, b: BoolArray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def _picture(image: Image, window: Window, pictures: list[Any], path: Path) -> None:
    """Prompted slice and coronal cut of each object: mask filled, truth outlined, seen from the feet."""
    grey = window.apply(image.array)
    spacing = voxel_sizes(image.affine)
    width, depth, height = image.shape * spacing
    figure = Figure(figsize=(3 * len(pictures), 3.2 * (depth + height) / width + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(pictures), squeeze=False, height_ratios=[depth, height])
    for column, (organ, row, mask, truth) in enumerate(pictures):
        j = int(np.argmax(truth.sum(axis=(0, 2))))
        for axis, cut, aspect, title in (
            (axes[0, column], np.s_[:, :, row["k"]], 1, f"{organ}: 3D Dice {row['dice3d']:.2f}"),
            (axes[1, column], np.s_[:, j, :], 2, "coronal"),
        ):
            axis.imshow(
                grey[cut].T,
                cmap="gray",
                origin="lower",
                vmin=0,
                vmax=1,
                aspect=spacing[aspect] / spacing[0],
            )
            axis.contourf(mask[cut].T, levels=[0.5, 1], colors=["#ff5533"], alpha=0.4)
            axis.contour(truth[cut].T, levels=[0.5], colors=["#33ddff"], linewidths=0.8)
            if image.affine[0, 0] > 0:
                axis.invert_xaxis()
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.savefig(path, dpi=110)
