"""Fit the lines from a mask's features to the IoU that it really reaches, on held-out patients.

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
from sam_infer.engines.bundledrank import Answer, Calibration
from sam_infer.geometry import tight_box
from sam_infer.prompts.simulated import jitter_box, next_click
from sam_infer.types import BoolArray, Prompts
from trainers.pretrain.cases import Case, held_out_cases
from trainers.pretrain.evaluate import with_clicks
from trainers.pretrain.export import export


def fit(features: NDArray[np.float64], real: NDArray[np.float64]) -> list[float]:
    """The line with the least squared error that rises with every feature.

    Args:
        features: (N, F), N at least 2.
        real: (N,), the IoU really reached.

    Returns:
        The offset and F weights, none of the weights below 0.
    """
    if len(features) < 2:
        raise ValueError(f"features must have at least 2 rows, got {len(features)}")
    table = np.column_stack([np.ones(len(features)), features])
    low = np.array([-np.inf] + [0.0] * features.shape[1])
    return [round(float(v), 4) for v in lsq_linear(table, real, (low, np.inf)).x]


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
    clicks, before = [first], answers[2].logits[int(answers[2].features[:, 2].argmax())]
    for _ in range(2):
        more = next_click(truth, before > 0)
        if more is None:
            break
        clicks.append(more)
        answer = engine.answers(embedding, [with_clicks(clicks, None, before)])[0]
        before = answer.logits[int(answer.features[:, 2].argmax())]
        answers.append(answer)
    return [(answer, [_iou(logits > 0, truth) for logits in answer.logits]) for answer in answers]


def main(arguments: list[str] | None = None) -> None:
    """Parse, gather the answers of held-out patients, fit, write the header."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain.calibrate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--weights", type=Path, required=True, help="the file to calibrate, in place")
    parser.add_argument("--per-set", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rng = np.random.default_rng(0)
    engine = BundledEngine(weights=given.weights)
    found = [f for case in held_out_cases(given.data, given.per_set, 1) for f in gather(engine, case, rng)]
    lines = {}
    for name, several in (("one", False), ("several", True)):
        mine = [(answer, real) for answer, real in found if (len(real) > 1) == several]
        features = np.concatenate([answer.features for answer, _ in mine])
        real = np.concatenate([np.array(r) for _, r in mine])
        lines[name] = fit(features if several else features[:, :2], real)
        after = np.concatenate([Calibration(**{name: tuple(lines[name])}).iou(a.features) for a, _ in mine])
        before = np.abs(features[:, 0] - real).mean()
        print(f"{name}: {len(real)} masks, IoU error {before:.3f} -> {np.abs(after - real).mean():.3f}")
    rewrite(given.weights, lines)
    print(f"iou_calibration = {lines}")


def _iou(a: BoolArray, b: BoolArray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def rewrite(path: Path, calibration: Mapping[str, Sequence[float]]) -> None:
    """Set ``iou_calibration`` of a weight file and keep everything else."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        header = file.metadata()
    facts = {key: json.loads(value) for key, value in header.items() if key not in ("format", "widths")}
    export(tensors, path, facts | {"iou_calibration": dict(calibration)})


if __name__ == "__main__":
    main()
