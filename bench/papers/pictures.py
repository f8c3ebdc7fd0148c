"""Pictures of finished rows: the median and the worst test images, and Dice over labelled images."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.papers.records import Outcome
from bench.papers.sets import LabelImage, Sample
from bench.papers.statistics import image_dice
from sam_infer.geometry import slice_image
from sam_infer.networks.unet import grey
from sam_infer.types import Box

_SHOWN = 2


def chosen_cases(outcome: Outcome) -> list[str]:
    """The test images in the middle and at the end of a row's Dice, best first."""
    dice = {name: image_dice(judged) for name, judged in outcome.test.items()}
    ranked = sorted((n for n, value in dice.items() if np.isfinite(value)), key=lambda n: (-dice[n], n))
    middle = max(0, (len(ranked) - _SHOWN) // 2)
    return list(dict.fromkeys(ranked[middle : middle + _SHOWN] + ranked[-_SHOWN:]))


def draw_cases(
    path: Path,
    samples: Sequence[Sample],
    columns: Mapping[str, Outcome],
    labels: Mapping[str, int],
    *,
    boxes: Mapping[str, Box | None],
) -> None:
    """Image, truth, and what each row predicts.

    Args:
        path: The picture to write.
        samples: The test images to show, a line each.
        columns: Title to the row's outcome.
        labels: Label name to value.
        boxes: By image name, a prompt to draw into all but the reference; what is not named has none.
    """
    titles = ["image", "reference", *columns]
    figure = Figure(figsize=(2.3 * len(titles), 2.5 * len(samples)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(samples), len(titles), squeeze=False)
    for number, (line, sample) in enumerate(zip(axes, samples, strict=True)):
        shown = [np.zeros_like(sample.truth), sample.truth]
        shown += [one.predictions[sample.name] for one in columns.values()]
        below = [sample.name, "", *[f"Dice {image_dice(o.test[sample.name]):.2f}" for o in columns.values()]]
        image = sample.window.apply(grey(slice_image(sample.image.array, 0)))
        for axis, title, mask, text in zip(line, titles, shown, below, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.imshow(_coloured(mask, labels), interpolation="nearest")
            box = boxes.get(sample.name)
            if box is not None and mask is not sample.truth:
                x0, y0, x1, y1 = box
                frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, color="yellow")
                axis.add_patch(frame)
            axis.set_xlabel(text, fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
            if not number:
                axis.set_title(textwrap.fill(title, 24), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_curves(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
    *,
    over: str = "labelled images",
    level: Collection[str] = ("all",),
) -> None:
    """Test Dice over the number of images, with standard deviations over seeds.

    Args:
        path: The picture to write.
        lines: From `bench.papers.tables.summary`.
        titles: Row name to title, of the rows to draw.
        over: What images they are.
        level: Rows that do not depend on their number, and become level lines.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, (name, title) in enumerate(titles.items()):
        points = sorted((p for p in lines if p["row"] == name), key=lambda p: p["n"])
        if not points:
            continue
        colour = colormaps["tab10"](number % 10)
        if name in level:
            axis.axhline(points[0]["test_dice"], color=colour, linestyle="--", label=title)
            continue
        axis.errorbar(
            [p["n"] * (1 + 0.008 * number) for p in points],
            [p["test_dice"] for p in points],
            yerr=[np.nan_to_num(p["test_dice_sd"]) for p in points],
            color=colour,
            marker="o",
            capsize=3,
            label=title,
        )
    counts = sorted({p["n"] for p in lines if p["row"] in titles and p["row"] not in level})
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel(over)
    axis.set_ylabel("test Dice, mean and standard deviation over seeds")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _coloured(mask: LabelImage, labels: Mapping[str, int]) -> np.ndarray:
    """(H, W, 4): a colour for each label, nothing where there is none."""
    table = np.zeros((256, 4))
    palette = colormaps["hsv"](np.linspace(0, 1, len(labels), endpoint=False))
    table[list(labels.values())] = palette * [1, 1, 1, 0.45]
    return table[mask]
