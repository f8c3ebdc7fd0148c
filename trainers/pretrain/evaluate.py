"""Dice of a promptable engine, set by set, beside trivial answers to the same boxes.

``python -m trainers.pretrain.evaluate --data DIR --out DIR [--engine NAME] [--weights FILE]``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.base import Engine
from sam_infer.engines.registry import create_engine
from sam_infer.geometry import tight_box
from sam_infer.intensity import Window
from sam_infer.overlap import dice
from sam_infer.prompts.simulated import jitter_box, next_click
from sam_infer.types import Box, Candidates, FloatArray, Prompts
from sam_infer.volumes import Image
from trainers.pretrain.baselines import BASELINES, baseline, opencv
from trainers.pretrain.cases import Case, benchmark_cases, held_out_cases

COLUMNS = ("box", "jitter", "c1", "c3", "c5", "box+1")
_ZOOM = {"engine": None, "on": True, "off": False}
_CLICKS = 5
_JITTER = 0.1


Ask = Callable[[Prompts], Candidates]
#: What answers the prompts of an (H, W) float32 image.
Answers = Callable[[FloatArray], Ask]


def answers_of(engine: Engine, *, zoom: bool | None = None) -> Answers:
    """An engine's own answers, or those of the click path around it.

    Args:
        engine: Any promptable engine.
        zoom: None = the engine alone, which gets each previous answer as the mask to refine; True or False =
            as a click is served, where the click history does that, with crops around small objects or not.
    """

    def alone(image: FloatArray) -> Ask:
        embedding = engine.encode(image)
        return lambda prompt: engine.decode(embedding, [prompt])[0]

    def served(image: FloatArray) -> Ask:
        encoder, scan = (
            SliceEncoder(engine=engine),
            Image(array=image.T[..., None], affine=np.eye(4), key=("case",), flat=True, transient=True),
        )
        window = Window(level=0.5, width=1.0)
        return lambda prompt: encoder.decode_history(
            scan, 0, window, replace(prompt, mask_logits=None), zoom=zoom
        )

    return alone if zoom is None else served


def measure(
    answers: Answers, case: Case, rng: np.random.Generator, baselines: Sequence[str] = BASELINES
) -> tuple[dict[str, float], list[list[float]]]:
    """All columns of one object.

    Args:
        answers: What is measured.
        case: The object.
        rng: Source of the box's jitter.
        baselines: Which trivial answers to measure beside.

    Returns:
        Dice by column, baselines included as ``name`` and ``name, jitter``; and [predicted, real] IoU of
        every answer that obeyed its clicks.
    """
    truth, answer_to = case.truth, answers(case.image)
    tight = tight_box(truth)
    assert tight is not None
    loose = jitter_box(tight, _JITTER, rng, case.truth.shape)  # type: ignore[arg-type]
    found: dict[str, float] = {}
    pairs: list[list[float]] = []

    def ask(prompt: Prompts, column: str) -> FloatArray:
        answer = answer_to(prompt)
        found[column] = dice(answer.mask(), truth)
        if _obeys(answer, prompt):
            pairs.append([float(answer.iou[answer.best]), found[column] / (2 - found[column])])
        logits: FloatArray = answer.logits[answer.best]
        return logits

    for name in baselines:
        found[name] = dice(baseline(name, case.image, tight), truth)
        found[f"{name}, jitter"] = dice(baseline(name, case.image, loose), truth)
    logits = ask(Prompts(box=tight), "box")
    ask(Prompts(box=loose), "jitter")
    click = next_click(truth, logits > 0)
    if click is None:
        found["box+1"] = found["box"]
    else:
        ask(with_clicks([click], tight, logits), "box+1")
    clicks: list[tuple[float, float, int]] = []
    before: FloatArray | None = None
    for number in range(1, _CLICKS + 1):
        click = next_click(truth, np.zeros_like(truth) if before is None else before > 0)
        if click is None:
            found[f"c{number}"] = found[f"c{number - 1}"]
            continue
        clicks.append(click)
        before = ask(with_clicks(clicks, None, before), f"c{number}")
    return found, pairs


def evaluate(
    answers: Answers, cases: Iterable[Case], seed: int = 0, baselines: Sequence[str] = BASELINES
) -> dict[str, object]:
    """Measure every case and average by set and by group of sets.

    Returns:
        ``rows``: {set: {"group", "objects", column: mean Dice}}; ``mean``: the same over all objects of a
        group; ``iou_error``: mean absolute error of the predicted IoU by group; ``pairs`` by group.
    """
    sums: dict[str, list[dict[str, float]]] = {}
    groups: dict[str, str] = {}
    pairs: dict[str, list[list[float]]] = {}
    for number, case in enumerate(cases):
        found, some = measure(answers, case, np.random.default_rng([seed, 7, number]), baselines)
        sums.setdefault(case.name, []).append(found)
        groups[case.name] = case.group
        pairs.setdefault(case.group, []).extend(some)
    rows = {n: {"group": groups[n], "objects": len(v), **_mean(v)} for n, v in sums.items()}
    mean = {
        group: _mean([found for n, v in sums.items() if groups[n] == group for found in v])
        for group in dict.fromkeys(groups.values())
    }
    error = {g: float(np.abs(np.subtract(*np.array(p).T)).mean()) for g, p in pairs.items() if p}
    return {"rows": rows, "mean": mean, "iou_error": error, "pairs": pairs}


def markdown(result: dict[str, object]) -> str:
    """The result as tables: one line a set, baselines beside."""
    mean: dict[str, dict[str, float]] = result["mean"]  # type: ignore[assignment]
    measured = next(iter(mean.values()))
    trivial = [f"{name}{more}" for more in ("", ", jitter") for name in BASELINES]
    shown = [*COLUMNS, *(column for column in trivial if column in measured)]
    lines = ["| set | objects | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    rows: dict[str, dict[str, float]] = result["rows"]  # type: ignore[assignment]
    for group in mean:
        mine = {n: r for n, r in rows.items() if r["group"] == group}  # type: ignore[comparison-overlap]
        for name, row in mine.items():
            lines.append(
                f"| {name} | {row['objects']} | " + " | ".join(f"{row[c]:.3f}" for c in shown) + " |"
            )
        count = sum(int(r["objects"]) for r in mine.values())
        values = " | ".join(f"**{mean[group][c]:.3f}**" for c in shown)
        lines.append(f"| **{group}, mean of objects** | {count} | {values} |")
    lines += ["", f"Mean absolute error of the predicted IoU: {result['iou_error']}"]
    return "\n".join(lines) + "\n"


def with_clicks(
    clicks: list[tuple[float, float, int]], box: Box | None, before: FloatArray | None
) -> Prompts:
    """Clicks (x, y, label) with a box and a previous answer\'s logits, where there are any."""
    return Prompts(
        points=np.array([c[:2] for c in clicks], np.float32),
        point_labels=np.array([c[2] for c in clicks], np.int64),
        box=box,
        mask_logits=before,
    )


def _obeys(answer: Candidates, prompt: Prompts) -> bool:
    x, y = np.rint(prompt.points).astype(int).T
    return bool((answer.mask()[y, x] == (prompt.point_labels == 1)).all())


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {column: float(np.mean([row[column] for row in rows])) for column in rows[0]}


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, write ``table.md`` and ``table.json``."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain.evaluate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", default="bundled", help="name of the engine, as in the project file")
    parser.add_argument("--weights", type=Path, help="its weight file; bundled: the shipped one by default")
    parser.add_argument(
        "--zoom", choices=_ZOOM, default="engine",
        help="engine: the engine by itself; on, off: as a click is served, with crops around objects or not",
    )  # fmt: skip
    parser.add_argument("--per-set", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--part", choices=("all", "benchmark", "held-out"), default="all",
        help="benchmark: sets that never train; held-out: patients kept out of those that do, for decisions",
    )  # fmt: skip
    parser.add_argument("--no-baselines", action="store_true", help="measure the engine alone")
    given = parser.parse_args(arguments)
    baselines = () if given.no_baselines else BASELINES
    try:
        if baselines:
            opencv()
    except ModuleNotFoundError as missing:
        parser.error(str(missing))
    torch.set_num_threads(given.threads)
    engine = create_engine(given.engine, weights=given.weights)
    cases: list[Case] = []
    if given.part != "held-out":
        cases += benchmark_cases(given.data, given.per_set, given.seed)
    if given.part != "benchmark":
        cases += held_out_cases(given.data, given.per_set, given.seed)
    result = evaluate(answers_of(engine, zoom=_ZOOM[given.zoom]), cases, given.seed, baselines)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(markdown(result))
    (given.out / "table.json").write_text(json.dumps(result, indent=1))
    print(markdown(result))


if __name__ == "__main__":
    main()
