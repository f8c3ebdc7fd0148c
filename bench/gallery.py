"""One object each of six kinds of image, prompted three ways: a picture of what an engine answers.

python -m bench gallery --data DIR --out docs/engines.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sam_infer.engines.base import Embedding, Engine
from sam_infer.engines.registry import NAMES, create_engine
from sam_infer.geometry import tight_box
from sam_infer.intensity import Window
from sam_infer.overlap import dice
from sam_infer.prompts.simulated import next_click
from sam_infer.types import BoolArray, FloatArray, Prompts
from trainers.pretrain.evaluate import with_clicks

WAYS = ("a box", "one click", "three clicks")


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A labelled image whose licence allows passing it on, of a patient that trains nothing."""

    title: str
    path: str
    label: int = 1
    ct: Window | None = None


_SHOWN = (
    _Shown(title="chest X-ray: lungs", path="cxr_lung_v7/images/cxr_1676578.png"),
    _Shown(title="CT: bladder", path="multi_medscribble/images/BTCV_2609008-Image_axis1_maxslice.png"),
    _Shown(
        title="CT angiography:\npulmonary artery",
        path="ct_totalseg_vessels/images/ts_pulmonary_ct.nii.gz",
        ct=Window(level=100, width=600),
    ),
    _Shown(title="T1 MR: sarcoma", path="ctmr_sts_mass/images/STS_002_MR_T1.nii.gz"),
    _Shown(title="cardiac MR:\nleft ventricle", path="mr_wholeheart_hvsmr2/images/hvsmr_10002_24.png"),
    _Shown(
        title="OCT angiography:\nvessels", path="multi_medscribble/images/OCTA500_10029_axis0_midslice.png"
    ),
)


def add_parser(commands: Any) -> None:
    """Add ``gallery`` to the command line."""
    parser = commands.add_parser("gallery", help="a picture of prompts and masks on six kinds of image")
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--engine", default="bundled", choices=NAMES)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Ask the engine, draw, write the picture."""
    engine = create_engine(args.engine, weights=args.weights)
    figure = Figure(figsize=(2 * len(_SHOWN), 2.15 * len(WAYS) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(WAYS), len(_SHOWN), squeeze=False)
    for column, shown in enumerate(_SHOWN):
        image, truth = _read(args.data, shown)
        embedding = engine.encode(image)
        for row, way in enumerate(WAYS):
            prompt, mask = _ask(engine, embedding, truth, way)
            axis = axes[row, column]
            _draw(axis, image, truth, prompt, mask)
            axis.set_xlabel(f"Dice {dice(mask, truth):.2f}", fontsize=9)
            if not row:
                axis.set_title(shown.title, fontsize=9)
            if not column:
                axis.set_ylabel(way, fontsize=10)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)
    return 0


def _read(data: Path, shown: _Shown) -> tuple[FloatArray, BoolArray]:
    """The image (H, W) in 0..1 and the object's mask; of a volume the slice that shows most of it."""
    path = data / shown.path
    labels_path = path.parent.parent / "labels" / path.name
    if path.suffix == ".png":
        grey = np.asarray(Image.open(path).convert("L"), np.float32) / 255
        return grey, np.asarray(Image.open(labels_path).convert("L")) == shown.label
    image: Any = nib.load(path)
    labels: Any = nib.load(labels_path)
    wanted = np.asarray(labels.dataobj) == shown.label
    k = int(wanted.sum((0, 1)).argmax())
    plane = np.asarray(image.dataobj, np.float32)[:, :, k].T
    if shown.ct is not None:
        return np.asarray(shown.ct.apply(plane), np.float32), wanted[:, :, k].T
    low, high = np.percentile(plane, [0.5, 99.5])
    return np.clip((plane - low) / (high - low), 0, 1).astype(np.float32), wanted[:, :, k].T


def _ask(engine: Engine, embedding: Embedding, truth: BoolArray, way: str) -> tuple[Prompts, BoolArray]:
    """The last prompt of a way and the answer to it; clicks go to the middle of the largest error."""
    if way == "a box":
        prompt = Prompts(box=tight_box(truth))
        return prompt, engine.decode(embedding, [prompt])[0].mask()
    clicks: list[tuple[float, float, int]] = []
    before: FloatArray | None = None
    prompt = Prompts()
    for _ in range(1 if way == "one click" else 3):
        click = next_click(truth, np.zeros_like(truth) if before is None else before > 0)
        if click is None:
            break
        clicks.append(click)
        prompt = with_clicks(clicks, None, before)
        answer = engine.decode(embedding, [prompt])[0]
        before = answer.logits[answer.best]
    assert before is not None, "a truth is never empty"
    return prompt, before > 0


def _draw(axis: Any, image: FloatArray, truth: BoolArray, prompt: Prompts, mask: BoolArray) -> None:
    """The object's surroundings: mask filled, truth outlined, prompt on top."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.imshow(np.where(mask, 1.0, np.nan), cmap="autumn", vmin=0, vmax=2, alpha=0.45)
    axis.contour(truth, [0.5], colors="deepskyblue", linewidths=0.9)
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box
        axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="yellow", linewidth=1)
    for (x, y), label in zip(prompt.points, prompt.point_labels, strict=True):
        axis.plot(x, y, "o", markersize=5, color="lime" if label else "magenta", markeredgecolor="black")
    box = tight_box(truth)
    assert box is not None
    half = 0.9 * max(box[2] - box[0], box[3] - box[1], 20)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    axis.set_xlim(max(x - half, -0.5), min(x + half, image.shape[1] - 0.5))
    axis.set_ylim(min(y + half, image.shape[0] - 0.5), max(y - half, -0.5))
    axis.set_xticks([])
    axis.set_yticks([])
