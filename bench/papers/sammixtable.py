"""The tables of `bench.papers.sammix` from finished rows, and what is said below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.papers import report, statistics
from bench.papers.camlooks import GOOD, quality, recognised
from bench.papers.records import Outcome
from bench.papers.sammixcells import Mix, Turn
from bench.papers.sammixrows import BASE
from bench.table import markdown

HEAD = (
    *("n", "row", "box IoU", "test Dice", "difference to U-Net (95 %)", "HD95", "missed", "shifted Dice"),
    *("Dice with / without the classifier's say", "false positives with / without"),
    *("masks drawn / image-level labels", "s"),
)
ORACLE_HEAD = (*HEAD[:8], "masks drawn", "s")
_FIGURES = (
    *("box_iou", "shifted_dice", "image_labels", "gated_dice", "ungated_dice", "gated_false"),
    *("ungated_false", "attention"),
)
NOTES = """\
Boxes come from activation maps (CAM) of a classifier that learned from image-level labels of all images
outside the test part: around the part of the map with its peak, from {threshold:g} of its range on. CAM mask:
that part, added to the image's embedding with learned weights. Where the map shows nothing, nothing is found;
in training the box is then the middle half of the image. Where the classifier says absent, rows with a CAM
box find nothing; the columns with / without its say show both for every row, and the row's other figures are
those with it for rows with a CAM box, and without it for others. n: images with masks, drawn from the {there}
outside the test part that hold the label ({absent} do not), so nobody drew empty masks. Dice: on test images
that hold the label, mean and standard deviation over seeds; false positives: share of the test images without
it ({negatives}) in which anything is found. HD95 in pixels of the image as stored, of what was found; missed:
share of the images with the label in which nothing was found. Difference: of Dice to the U-Net of the same
masks, 95 % bootstrap over test images, all seeds of an image together.

Shifted Dice: {shifted}.

SAMs: {steps} steps of {batch} prompts at a rate of {rate:g}, on whole images, binary cross entropy and Dice.
Their classifier is a ResNet-38 and their SAM a ViT with low-rank products in the encoder for thousands of
slices; here the classifier is a small one ({looks} steps), the encoder stands still but in the row that says
so, and the classifier does not learn together with the SAM. Clinicians' prompts: boxes and clicks as
accepted cases are learned from, this project's addition, since boxes in use are not those of the masks. The
second table prompts with boxes of the truth, which nobody has: it says what better boxes would be worth, and
none of its figures belongs beside the first table's. Seconds: of all that a row needs, on a machine that may
have had other work.
"""


def quality_lines(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """How good the boxes are, a line for each threshold: means over seeds, on test and training images."""
    study = turns[0].study
    parts = {"test": study.split.test, "train": study.split.train}
    found = {
        part: [quality(turn.looks(samples), samples) for turn in turns] for part, samples in parts.items()
    }
    return [
        {
            "threshold": line["threshold"],
            **{
                f"{part}_{name}": float(np.mean([one[number][name] for one in seeds]))
                for part, seeds in found.items()
                for name in ("iou", "good")
            },
        }
        for number, line in enumerate(found["test"][0])
    ]


def recognition(turns: Sequence[Turn]) -> dict[str, float]:
    """What share of the test images the classifiers say the truth about, means over seeds."""
    samples = turns[0].study.split.test
    found = [recognised(turn.looks(samples), samples) for turn in turns]
    return {name: float(np.mean([one[name] for one in found])) for name in ("present", "absent")}


def quality_table(lines: Sequence[Mapping[str, Any]], right: Mapping[str, float]) -> str:
    """The boxes' quality, which decides everything else."""
    rows = [
        [
            line["threshold"],
            *[plain(line[f"{part}_{name}"]) for part in ("test", "train") for name in ("iou", "good")],
        ]
        for line in lines
    ]
    good = f"share above {GOOD:g}"
    head = ("CAM threshold", "box IoU, test", good, "box IoU, training", good)
    said = (
        f"The classifier is right about {plain(right['present'])} of the test images with the label, and "
        f"about {plain(right['absent'])} of those without."
    )
    return f"{markdown(head, rows)}\n{said}\n"


def row_lines(done: Sequence[Outcome], names: Sequence[str]) -> list[dict[str, Any]]:
    """`bench.papers.report.summaries` of some rows, with the figures of this paper's."""
    out = []
    for line in report.summaries(done, names, BASE):
        some = [one for one in done if one.row == line["row"] and one.n == line["n"]]
        means = {name: _mean([one.figures[name] for one in some if name in one.figures]) for name in _FIGURES}
        out.append({**line, **means})
    return out


def beside_unets(done: Sequence[Outcome], row: str) -> list[dict[str, Any]]:
    """The differences of a row that needs no masks to the U-Nets of each number of masks."""
    ours = {one.seed: one.test for one in done if one.row == row}
    out = []
    for n in sorted({one.n for one in done if one.row == BASE}):
        pairs = [
            (ours[one.seed], one.test) for one in done if one.row == BASE and one.n == n and one.seed in ours
        ]
        if pairs:
            difference = statistics.paired_interval(*zip(*pairs, strict=True))
            out.append({"n": n, "row": row, "difference": difference})
    return out


def table(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """What can be had without the truth."""
    return markdown(
        HEAD,
        [
            [
                *_cells(line, titles),
                f"{plain(line['gated_dice'])} / {plain(line['ungated_dice'])}",
                f"{plain(line['gated_false'], 2)} / {plain(line['ungated_false'], 2)}",
                f"{line['drawn']} / {plain(line['image_labels'], 0)}",
                plain(line["minutes"] * 60, 0),
            ]
            for line in lines
        ],
    )


def oracle_table(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """What boxes of the truth would give."""
    return markdown(
        ORACLE_HEAD,
        [[*_cells(line, titles), line["drawn"], plain(line["minutes"] * 60, 0)] for line in lines],
    )


def attention_words(lines: Sequence[Mapping[str, Any]]) -> str:
    """How much the CAM mask has come to say, "" where no row has it."""
    found = [line["attention"] for line in lines if not math.isnan(line["attention"])]
    if not found:
        return ""
    return (
        f"Weights with which the CAM mask is added to the image's embedding: {_mean(found):.4f} on average, "
        "learned from 0 on, beside numbers of the size of 1.\n"
    )


def beside_table(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """What a SAM without masks is beside U-Nets."""
    rows = [[line["n"], titles[line["row"]], interval(line["difference"])] for line in lines]
    return markdown(("n of the U-Net", "row", "difference to that U-Net (95 %)"), rows)


def words(turn: Turn, mix: Mix, away: str) -> str:
    """What is said below the tables.

    Args:
        turn: Any.
        mix: The settings.
        away: Of the shifted images.
    """
    train, test = turn.study.split.train, turn.study.split.test
    there = sum(bool(sample.present) for sample in train)
    return NOTES.format(
        threshold=mix.threshold,
        there=there,
        absent=len(train) - there,
        negatives=sum(not sample.present for sample in test),
        shifted=away,
        looks=mix.looks,
        **vars(mix.schooling),
    )


def _cells(line: Mapping[str, Any], titles: Mapping[str, str]) -> list[Any]:
    sd = line["test_dice_sd"]
    spread = "" if math.isnan(sd) else f" +- {sd:.3f}"
    return [
        line["n"],
        titles[line["row"]],
        plain(line["box_iou"]),
        plain(line["test_dice"]) + spread,
        interval(line["difference"]),
        plain(line["hd95"], 1),
        plain(line["missed"]),
        plain(line["shifted_dice"]),
    ]


def plain(value: float, digits: int = 3) -> str:
    """A figure for people."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def interval(found: tuple[float, float, float] | None) -> str:
    """A difference and its interval for people."""
    return "-" if found is None else f"{found[0]:+.3f} ({found[1]:+.3f}, {found[2]:+.3f})"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
