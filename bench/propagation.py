"""Few prompts -> 3D Dice: how far a box, a click, or boxes on two slices carry through a volume.

python -m bench propagation --data ct_totalseg_examples --organs liver,spleen,aorta --out results
python -m bench propagation --data mr_left_atrium_la2018 --prompts box,click,boxes --out results
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
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.axes import turned_array, turned_clicks, turned_image
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
    parser = commands.add_parser("propagation", help="3D Dice of a box, a click, or two boxes")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with images/, labels/ and, of several organs, labels.json",
    )
    parser.add_argument(
        "--organs", default=ORGANS, help="names in labels.json; without it, label 1 is measured"
    )
    parser.add_argument("--prompts", default="box", help=f"of {', '.join(PROMPTS)}")
    parser.add_argument("--axis", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--engine", default="bundled", choices=NAMES)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for table.json and the pictures")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write it and a picture of each volume's boxes along axis 2."""
    file = args.data / "labels.json"
    names = json.loads(file.read_text()) if file.is_file() else {}
    encoder = SliceEncoder(engine=create_engine(args.engine, weights=args.weights))
    library = ImageLibrary(limit=1 << 30, ct=CT)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in sorted((args.data / "images").glob("*.nii.gz")):
        stem = path.name.removesuffix(".nii.gz")
        image = library.read(path)
        label = read_labelmap(args.data / "labels" / path.name, image)
        indices = {name: int(index) for index, (name, _) in names.get(stem, {}).items()}
        pictures = []
        for organ in args.organs.split(",") if names else ["label 1"]:
            truth = label == (indices.get(organ, -1) if names else 1)
            if truth.sum() < 50:
                continue
            for prompt in args.prompts.split(","):
                row, mask = _measure(image, truth, prompt, args.axis, encoder, library)
                rows.append({"volume": stem, "organ": organ, "prompt": prompt, **row})
                if prompt == "box" and args.axis == 2:
                    pictures.append((organ, row, mask, truth))
                dices = [f"{row[key]:.3f}" for key in ("dice3d", "dice_slice")]
                effort = [f"{row['seconds']:.2f} s", f"{row['cpu_seconds']:.2f} s", row["decoded"]]
                shown = [stem, organ, prompt, *dices, row["extent"], row["found"], *effort, row["stops"]]
                print("|", " | ".join(map(str, shown)), "|", flush=True)
        if pictures:
            _picture(image, library.window_for(image, {}), pictures, args.out / f"{stem}.png")
    means = {}
    for prompt in args.prompts.split(","):
        mine = [row for row in rows if row["prompt"] == prompt]
        means[prompt] = {key: float(np.mean([row[key] for row in mine])) for key in ("dice3d", "cpu_seconds")}
        dice, seconds = means[prompt].values()
        print(f"{prompt}: mean 3D Dice over {len(mine)} objects {dice:.3f}, {seconds:.2f} CPU s each")
    (args.out / "table.json").write_text(json.dumps({"mean": means, "rows": rows}, indent=1))
    return 0


def _measure(
    image: Image, truth: BoolArray, prompt: str, axis: int, encoder: SliceEncoder, library: ImageLibrary
) -> tuple[dict[str, Any], BoolArray]:
    """Prompt an object on slices of its extent along an axis, and propagate."""
    turned = turned_array(truth, axis)
    extent = np.flatnonzero(turned.any(axis=(0, 1)))
    request = PROMPTS[prompt](turned, extent)
    clicks = parse_clicks(request, turned_image(image, axis).shape)
    window = library.window_for(image, {})
    start, start_cpu = time.perf_counter(), time.process_time()
    found = click_volume(
        image, turned_clicks(clicks, axis), encoder=encoder, window=window, mark=lambda _: None, axis=axis
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    mask = turned_array(found.labelmap, axis) > 0
    k = found.slices[0]
    slices = np.flatnonzero(mask.any(axis=(0, 1)))
    return {
        "dice3d": _dice(mask, turned),
        "dice_slice": _dice(mask[:, :, k], turned[:, :, k]),
        "k": k,
        "extent": f"{extent[0]}-{extent[-1]}",
        "found": f"{slices[0]}-{slices[-1]}" if len(slices) else "none",
        "stops": ", ".join(f"{n}: {why}" for n, why in sorted(found.stops.items())),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "decoded": found.decoded,
    }, turned_array(mask, axis)


def _roi(truth: BoolArray, k: int) -> list[int]:
    box = tight_box(truth[:, :, k].T)
    assert box is not None
    return [int(v) for v in (box[0], box[2], box[1], box[3], k, k)]


def _box(truth: BoolArray, extent: NDArray[np.intp]) -> dict[str, Any]:
    """The tight box on the middle slice."""
    return {"roi": _roi(truth, int(extent[len(extent) // 2]))}


def _boxes(truth: BoolArray, extent: NDArray[np.intp]) -> dict[str, Any]:
    """The tight boxes on the slices at a quarter and three quarters of the extent."""
    slices = sorted({int(extent[len(extent) // 4]), int(extent[3 * len(extent) // 4])})
    return {"boxes": [_roi(truth, k) for k in slices]}


def _click(truth: BoolArray, extent: NDArray[np.intp]) -> dict[str, Any]:
    """A click on the middle slice where the object is widest."""
    k = int(extent[len(extent) // 2])
    depth = ndimage.distance_transform_edt(np.pad(truth[:, :, k], 1))[1:-1, 1:-1]
    i, j = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return {"foreground": [[int(i), int(j), k]]}


PROMPTS = {"box": _box, "boxes": _boxes, "click": _click}


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
