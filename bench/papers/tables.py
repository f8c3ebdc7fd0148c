"""The papers' tables from finished rows: markdown for people, the same figures for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.papers import statistics
from bench.papers.records import Outcome
from bench.table import markdown

#: Labels up to this number get columns of their own.
_COLUMNS = 6
NOTES = """\
Dice: mean over the labels that an image holds, then over images, as the authors judge; mean and standard
deviation over seeds. Strict: labels that were found and are not there count as 0. HD95 in pixels of the
image as stored, over labels that were found; missed: share of the labels that were not found at all,
which have no HD95. Intervals: 95 % bootstrap over test images, all seeds of an image together; images of
one patient are not independent, so they are rather too narrow.

Every network is trained from scratch, once, by the project's own loop: Dice and cross entropy with one
softmax over all labels, AdamW, a moving average of the weights, random changes. The authors' code trains
with weighted binary cross entropy (Keuth), or nothing is known (Häkkinen). Minutes: all that a row
needs, on a machine that may have had other work.
"""
KEUTH_HEAD = (
    *("n", "row", "pseudo-label Dice", "test Dice", "strict", "HD95", "missed", "difference to U-Net (95 %)"),
    *("masks drawn / images trained on", "clicks per image", "minutes"),
)
HAKKINEN_HEAD = (
    *("trained on", "pseudo-label Dice", "test Dice", "strict", "HD95", "missed"),
    *("difference to truth (95 %)", "test Dice - its labels' own there", "masks drawn per image"),
    *("clicks per image", "minutes"),
)


def summary(outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of one line of a table.

    Args:
        outcomes: Of one row at one number of labelled images, a seed each.
        base: What it is compared with, at the same number; only seeds that both have are.
    """
    values = [statistics.mean_dice(one.test) for one in outcomes]
    beside = {one.seed: one for one in base}
    pairs = [(one.test, beside[one.seed].test) for one in outcomes if one.seed in beside]
    same = [one.row for one in outcomes] == [one.row for one in base]
    difference = None if same or not pairs else statistics.paired_interval(*zip(*pairs, strict=True))
    own = [statistics.mean_dice(one.test) - statistics.mean_dice(one.own) for one in outcomes if one.own]
    return {
        "row": outcomes[0].row,
        "n": outcomes[0].n,
        "seeds": [one.seed for one in outcomes],
        "pseudo_dice": _mean([statistics.mean_dice(one.pseudo) for one in outcomes]),
        "test_dice": _mean(values),
        "test_dice_sd": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "strict_dice": _mean([statistics.mean_dice(one.test, strict=True) for one in outcomes]),
        "hd95": _mean([statistics.mean_hd95(one.test) for one in outcomes]),
        "missed": _mean([statistics.missed_share(one.test) for one in outcomes]),
        "difference": difference,
        "beats_its_labels": _mean(own),
        "drawn": outcomes[0].drawn,
        "trained": outcomes[0].trained,
        "clicks_per_image": _mean([one.clicks / max(1, one.trained) for one in outcomes]),
        "minutes": _mean([one.seconds / 60 for one in outcomes]),
    }


def keuth_table(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The table of all numbers of labelled images; ``lines`` from `summary`."""
    return markdown(
        KEUTH_HEAD,
        [
            [
                line["n"],
                titles[line["row"]],
                _plain(line["pseudo_dice"]),
                *_tested(line),
                f"{line['drawn']} / {line['trained']}",
                _plain(line["clicks_per_image"], 1),
                _plain(line["minutes"], 1),
            ]
            for line in lines
        ],
    )


def hakkinen_table(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Table 2: networks from labels of several kinds."""
    return markdown(
        HAKKINEN_HEAD,
        [
            [
                titles[line["row"]],
                _plain(line["pseudo_dice"]),
                *_tested(line),
                _signed(line["beats_its_labels"]),
                _plain(line["drawn"] / line["trained"], 1),
                _plain(line["clicks_per_image"], 1),
                _plain(line["minutes"], 1),
            ]
            for line in lines
        ],
    )


def strategy_lines(outcomes: Sequence[Outcome], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of Table 1: what each strategy's labels are worth on the training images."""
    lines = []
    for one in outcomes:
        objects = sum(len(judged["dice"]) for judged in one.pseudo.values())
        lines.append(
            {
                "strategy": one.row.removeprefix("labels-"),
                "clicks_per_object": one.clicks / max(1, objects),
                "objects": objects,
                "dice": {name: statistics.label_dice(one.pseudo, name) for name in labels},
                "failed": {name: statistics.failure_share(one.pseudo, name) for name in labels},
                "seconds_per_image": one.seconds / max(1, one.trained),
            }
        )
    return lines


def strategy_table(lines: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """Table 1; of many labels only their means."""
    shown = list(labels) if len(labels) <= _COLUMNS else []
    head = ["strategy", "clicks per object", "Dice", *[f"Dice {name}" for name in shown]]
    head += ["failed (Dice < 0.5)", *[f"failed {name}" for name in shown], "s per image"]
    rows = []
    for line in lines:
        cells = [line["strategy"], _plain(line["clicks_per_object"], 1)]
        for kind in ("dice", "failed"):
            values = line[kind]
            cells += [_plain(_mean(list(values.values()))), *[_plain(values[name]) for name in shown]]
        rows.append([*cells, _plain(line["seconds_per_image"], 2)])
    return markdown(head, rows)


def _tested(line: Mapping[str, Any]) -> list[str]:
    spread = "" if math.isnan(line["test_dice_sd"]) else f" +- {line['test_dice_sd']:.3f}"
    found = line["difference"]
    interval = "-" if found is None else f"{found[0]:+.3f} ({found[1]:+.3f}, {found[2]:+.3f})"
    strict, far, missed = _plain(line["strict_dice"]), _plain(line["hd95"], 1), _plain(line["missed"])
    return [_plain(line["test_dice"]) + spread, strict, far, missed, interval]


def _plain(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3f}"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
