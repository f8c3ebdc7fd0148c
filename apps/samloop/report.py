"""The report of a simulation: rounds, JSON, and a figure."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_infer.files import write_atomic

Report = dict[str, Any]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there, rounded to 4 digits; None where there is none."""
    found = [v for v in values if v is not None]
    return round(float(np.mean(found)), 4) if found else None


def summarise(cases: Sequence[dict[str, Any]], trainings: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each round, the cases between two trainings.

    Args:
        cases: Case records with ``round``, ``clicks``, ``proposal_dice``, ``final_dice``, ``seconds``.
        trainings: The training that ended a round, by the round's number.
    """
    rounds = []
    for number in sorted({case["round"] for case in cases}):
        own = [case for case in cases if case["round"] == number]
        rounds.append(
            {
                "round": number,
                "cases": len(own),
                "clicks_per_case": mean([c["clicks"] for c in own]),
                "proposals": sum(c["proposal_dice"] is not None for c in own),
                "proposal_dice": mean([c["proposal_dice"] for c in own]),
                "final_dice": mean([c["final_dice"] for c in own]),
                "seconds_per_case": mean([c["seconds"] for c in own]),
                "training": trainings.get(number),
            }
        )
    return rounds


def write_json(report: Report, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(report, indent=2) + "\n").encode())


def round_line(record: dict[str, Any]) -> str:
    """One line of text about a round."""
    proposal = record["proposal_dice"]
    parts = [
        f"round {record['round']}: {record['cases']} cases",
        "no proposals"
        if proposal is None
        else f"proposals' Dice {proposal:.3f} ({record['proposals']} cases)",
        f"{record['clicks_per_case']:.1f} clicks a case",
        f"final Dice {record['final_dice']:.3f}",
        f"{record['seconds_per_case']:.1f} s a case",
    ]
    training = record["training"]
    if training is not None:
        parts.append(training_line(training))
    return ", ".join(parts)


def training_line(training: dict[str, Any]) -> str:
    """A few words about a training."""
    if training.get("reason"):
        return f"{training['trainer']} {training['status'].lower()}: {training['reason']}"
    words = f"{training['trainer']} {training['status']} in {training['seconds']:.0f} s"
    if training.get("published") is not None:
        words += ", published" if training["published"] else ", not published"
        figures = [training.get(name) for name in ("champion_dice", "candidate_dice")]
        words += " (Dice " + " -> ".join("none" if v is None else f"{v:.3f}" for v in figures) + ")"
    return words


def plot_reports(reports: dict[str, Report], path: Path) -> None:
    """Draw reports side by side: clicks for each case, and how good the proposals were.

    One report shows each case's clicks and the mean of each round; several show the cumulative mean of
    clicks. Vertical lines, or dots on the curves, mark the ends of rounds.

    Args:
        reports: Name in the legend to report, as `apps.samloop.simulate.simulate` returns it.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, report) in enumerate(reports.items()):
        clicks = np.array([case["clicks"] for case in report["cases"]], float)
        at = np.arange(1, len(clicks) + 1)
        colour = f"C{number % 10}"
        ends = np.cumsum([r["cases"] for r in report["rounds"]])
        if len(reports) == 1:
            left.plot(at, clicks, "o", color=colour, alpha=0.35, clip_on=False, label="one case")
            starts = ends - [r["cases"] for r in report["rounds"]]
            levels = [r["clicks_per_case"] for r in report["rounds"]]
            left.hlines(levels, starts + 0.5, ends + 0.5, color=colour, lw=2.5, label="mean of the round")
            for end in ends[:-1]:
                for axes in (left, right):
                    axes.axvline(end + 0.5, color="0.8", lw=1, zorder=0)
        elif len(clicks):
            running = np.cumsum(clicks) / at
            left.plot(at, running, "-", color=colour, label=name)
            left.plot(ends, running[ends - 1], "o", color=colour, ms=5)
        proposals = [
            (end - (r["cases"] - 1) / 2, r["proposal_dice"])
            for end, r in zip(ends, report["rounds"], strict=True)
            if r["proposal_dice"] is not None
        ]
        if proposals:
            right.plot(*zip(*proposals, strict=True), "o-", color=colour, clip_on=False, label=name)
    several = len(reports) > 1
    left.set(xlabel="case", ylabel="clicks a case" + (" (cumulative mean)" if several else ""))
    left.set_ylim(bottom=0)
    right.set(xlabel="case (middle of the round)", ylabel="Dice of the proposals, before any click")
    right.set(ylim=(0, 1), xlim=left.get_xlim())
    if not right.lines or not any(line.get_marker() == "o" for line in right.lines):
        right.text(0.5, 0.5, "no proposals", transform=right.transAxes, ha="center", color="0.5")
    for axes in (left, right):
        axes.grid(axis="y", color="0.92")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1] and (several or axes is left):
            axes.legend(frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
