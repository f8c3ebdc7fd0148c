"""Fit the lines from a mask's features to the IoU that it really reaches: held-out patients, made images.

``python -m trainers.pretrain.calibrate --data DIR --weights FILE`` rewrites the file's header.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from scipy.optimize import lsq_linear

from sam_infer.engines.bundled import BundledEngine
from sam_infer.engines.bundledrank import KINDS, Answer
from sam_infer.geometry import tight_box
from sam_infer.prompts.simulated import jitter_box, next_click
from sam_infer.types import BoolArray, Prompts
from trainers.pretrain.cases import Case, held_out_cases, made_cases
from trainers.pretrain.evaluate import with_clicks
from trainers.pretrain.export import export

_RIDGE = 1e-4  # times the masks' weight: decides what a feature that never changes weighs
Masks = tuple[NDArray[np.float64], NDArray[np.float64]]


def fit(
    features: NDArray[np.float64], real: NDArray[np.float64], weight: NDArray[np.float64] | None = None
) -> list[float]:
    """The line with the least squared error that rises with every feature.

    Args:
        features: (N, F), N at least 2.
        real: (N,), the IoU really reached.
        weight: (N,), how much each mask counts; None for all alike.

    Returns:
        The offset and F weights, none of the weights below 0.
    """
    if len(features) < 2:
        raise ValueError(f"features must have at least 2 rows, got {len(features)}")
    root = np.ones(len(features)) if weight is None else np.sqrt(weight)
    table = np.column_stack([np.ones(len(features)), features]) * root[:, None]
    ridge = np.eye(table.shape[1])[1:] * np.sqrt(_RIDGE * (root**2).sum())
    low = np.array([-np.inf] + [0.0] * features.shape[1])
    found = lsq_linear(
        np.concatenate([table, ridge]), np.append(real * root, np.zeros(len(ridge))), (low, np.inf)
    )
    return [round(float(v), 4) for v in found.x]


def fit_cases(cases: Sequence[Masks], made: Sequence[Masks]) -> list[float]:
    """`fit` over the masks of some objects; all made ones together weigh as much as the real ones."""
    share = sum(len(real) for _, real in cases) / max(sum(len(real) for _, real in made), 1)
    both = [*cases, *made]
    weight = [np.full(len(real), 1.0 if n < len(cases) else share) for n, (_, real) in enumerate(both)]
    return fit(
        np.concatenate([f for f, _ in both]), np.concatenate([r for _, r in both]), np.concatenate(weight)
    )


def error_unseen(cases: Sequence[Masks], made: Sequence[Masks], folds: int = 5) -> float:
    """Mean absolute error on the masks of real objects, each fold of them left out of its fit."""
    wrong = []
    for fold in range(folds):
        line = fit_cases([c for n, c in enumerate(cases) if n % folds != fold], made)
        for features, real in cases[fold::folds]:
            wrong.append(np.abs(np.clip(line[0] + features @ np.array(line[1:]), 0, 1) - real))
    return float(np.concatenate(wrong).mean())


def gather(engine: BundledEngine, case: Case, rng: np.random.Generator) -> list[tuple[Answer, list[float]]]:
    """Answers to a tight box, a careless box, two first clicks and a third click, with their real IoU."""
    truth, embedding = case.truth, engine.encode(case.image)
    tight = tight_box(truth)
    first = next_click(truth, np.zeros_like(truth))
    assert tight is not None and first is not None
    ys, xs = np.nonzero(truth)
    pick = int(rng.integers(len(xs)))
    height, width = truth.shape
    prompts = [
        Prompts(box=tight),
        Prompts(box=jitter_box(tight, 0.15, rng, (height, width))),
        with_clicks([first], None, None),
        with_clicks([(float(xs[pick]), float(ys[pick]), 1)], None, None),
    ]
    answers = engine.answers(embedding, prompts)
    clicks, before = [first], answers[2].logits[int(answers[2].features[:, 0].argmax())]
    for _ in range(2):
        more = next_click(truth, before > 0)
        if more is None:
            break
        clicks.append(more)
        answer = engine.answers(embedding, [with_clicks(clicks, None, before)])[0]
        before = answer.logits[int(answer.features[:, 0].argmax())]
        answers.append(answer)
    return [(answer, [_iou(logits > 0, truth) for logits in answer.logits]) for answer in answers]


def main(arguments: list[str] | None = None) -> None:
    """Parse, gather the answers of held-out patients, fit, write the header."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain.calibrate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--weights", type=Path, required=True, help="the file to calibrate, in place")
    parser.add_argument("--per-set", type=int, default=16)
    parser.add_argument(
        "--made", type=int, default=60, help="images made by code, beside the held-out patients"
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rng = np.random.default_rng(0)
    engine = BundledEngine(weights=given.weights)
    real = [gather(engine, case, rng) for case in held_out_cases(given.data, given.per_set, 1)]
    made = [gather(engine, case, rng) for case in made_cases(given.made, 1)]
    if not real:
        parser.error(f"--data {given.data}: holds no held-out patient to fit on")
    lines = {}
    for name in KINDS:
        mine, more = _masks(real, name), _masks(made, name)
        lines[name] = fit_cases(mine, more)
        before = np.concatenate([np.abs(features[:, 0] - iou) for features, iou in mine]).mean()
        after = error_unseen(mine, more)
        counts = [sum(len(iou) for _, iou in masks) for masks in (mine, more)]
        print(f"{name}: {counts[0]} real and {counts[1]} made masks, IoU error {before:.3f} -> {after:.3f}")
    rewrite(given.weights, lines)
    print(f"iou_calibration = {lines}")


def _masks(objects: Sequence[Sequence[tuple[Answer, list[float]]]], kind: str) -> list[Masks]:
    """The features and IoU of every object that has answers of a kind."""
    found = []
    for answers in objects:
        mine = [(answer.features, real) for answer, real in answers if answer.kind == kind]
        if mine:
            found.append((np.concatenate([f for f, _ in mine]), np.concatenate([r for _, r in mine])))
    return found


def _iou(a: BoolArray, b: BoolArray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def rewrite(path: Path, calibration: Mapping[str, Sequence[float]]) -> None:
    """Set ``iou_calibration`` of a weight file and keep everything else."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        header = file.metadata()
    facts = {key: json.loads(value) for key, value in header.items() if key != "format"}
    export(tensors, path, facts | {"iou_calibration": dict(calibration)})


if __name__ == "__main__":
    main()
