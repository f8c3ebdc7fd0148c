"""The table of `bench.papers.konwer` from finished rows, and what is said below it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.papers import tables
from bench.papers.coarse import CARELESS, FOLDS, BoxSource
from bench.papers.policy import Start
from bench.papers.records import Outcome
from bench.papers.statistics import image_dice
from bench.table import markdown

HEAD = (
    *("stage 2 images", "row", "test Dice", "IoU", "difference to stage 1 (95 %)", "threshold", "band"),
    *("mean abs. margin", "loosest / strictest best", "masks drawn / images rated", "s"),
)
_FIGURES = ("threshold", "band", "margin", "loosest", "strictest", "rated")
_BOXES: Mapping[BoxSource, str] = {
    "careless": (
        f"the box of the truth with every side off by up to {CARELESS:.0%} of it; it is made from the truth "
        "of all images, those of the test too, and stands for a coarse source of boxes"
    ),
    "unet": (
        "the box of what a U-Net of the labelled images finds, the whole image where it finds nothing; for "
        f"the labelled images themselves, U-Nets that did not learn from them (up to {FOLDS} folds)"
    ),
}
NOTES = """\
Ratings and rankings by truth read the truth of every image of stage 2: weak, ordinal supervision, and not
learning without labels. Rows that say "no truth" do not. Masks are those of the whole image. Candidates,
their overlaps and the loss are on the network's grid of masks (its input's size over {grid}), the table's
Dice at the images' own resolution. The loss is the closed form of the published one with independent
pixels, a mean over the pixels that candidates disagree on, times {temperature:g}.

Difference: of test Dice to stage 1 of the same seed, 95 % bootstrap over test images, all seeds of an image
together. Threshold: of probability, 0.5 as published unless the row chooses it on the labelled images,
which stage 1 learned from. Swapped: of so many images two neighbours in rank. Band: share of all pixels on
which any candidate is preferred; margin: in the end, on the images of stage 2. Loosest / strictest best:
share of those images whose largest or smallest candidate is preferred, so that masks are told to grow or to
shrink. SAM's three masks are not what it answers a box with, and stage 1 does not tune them there. No box:
one around the whole image. Supervised: on labelled and further images together, for the steps of both
stages. Seconds: of both stages, without encoding, on a machine that may have had other work.
"""


def lines(done: Sequence[Outcome], names: Sequence[str], base: str) -> list[dict[str, Any]]:
    """A summary of each row at each number of images of stage 2, in the table's order.

    Args:
        done: Outcomes.
        names: Rows.
        base: The row that all are compared with; it has no stage 2.
    """
    beside = [one for one in done if one.row == base]
    out = []
    for n in sorted({one.n for one in done}):
        for name in names:
            some = [one for one in done if one.n == n and one.row == name]
            if some:
                figures = {key: _mean([o.figures.get(key, math.nan) for o in some]) for key in _FIGURES}
                seconds = _mean([one.seconds for one in some])
                summary = tables.summary(some, beside)
                out.append(summary | figures | {"iou": _mean([_iou(o) for o in some]), "seconds": seconds})
    return out


def table(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Markdown; ``lines`` from `lines`, ``titles`` by row name."""
    return markdown(HEAD, [_cells(line, titles[line["row"]]) for line in lines])


def words(starts: Sequence[Start], boxes: BoxSource) -> str:
    """What a table was measured with.

    Args:
        starts: One of each seed.
        boxes: Where boxes came from.
    """
    start, study = starts[0], starts[0].study
    stages, split, recipe = start.stages, study.split, study.recipe
    networks = ""
    if boxes == "unet":
        networks = f" U-Nets: {recipe.iterations} steps of {recipe.batch} images at {recipe.size} px."
    notes = NOTES.format(grid=start.frame.side // start.frame.low, temperature=stages.temperature)
    patients = len({sample.group for sample in split.test})
    return (
        f"{study.data.name}, {start.label}: {len(split.train)} images to learn from and {len(split.test)} to "
        f"test, of {patients} other patients or images; {len(start.draw.labelled)} are labelled; engine "
        f"{start.base.name}; {len(starts)} seeds. Stage 1: {stages.first} steps of {stages.batch} images at "
        f"a learning rate of {stages.rate:g}, prompt encoder and mask decoder, 20 focal + Dice; stage 2: "
        f"{stages.second} steps at {stages.second_rate:g}, mask decoder (published: 15 epochs at 1e-4, 30 "
        f"epochs at 1e-4). Box: {_BOXES[boxes]}.{networks} Text, the same of every image, so that it can "
        f"tell little: '{start.sentence}' (words and parts of words, hashed).\n\n{notes}"
    )


def _cells(line: Mapping[str, Any], title: str) -> list[object]:
    spread = "" if math.isnan(line["test_dice_sd"]) else f" +- {line['test_dice_sd']:.3f}"
    found = line["difference"]
    asked = not math.isnan(line["band"])
    return [
        line["n"] or "-",
        title,
        f"{line['test_dice']:.3f}{spread}",
        f"{line['iou']:.3f}",
        "-" if found is None else f"{found[0]:+.3f} ({found[1]:+.3f}, {found[2]:+.3f})",
        f"{line['threshold']:.2f}",
        f"{line['band']:.2%}" if asked else "-",
        f"{line['margin']:.2f}" if asked else "-",
        f"{line['loosest']:.0%} / {line['strictest']:.0%}" if asked else "-",
        f"{line['drawn']} / {line['rated']:.0f}",
        f"{line['seconds']:.0f}",
    ]


def _iou(outcome: Outcome) -> float:
    """Mean IoU of the test images: of one label it follows from Dice."""
    values = [image_dice(judged) for judged in outcome.test.values()]
    return _mean([value / (2 - value) for value in values])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
