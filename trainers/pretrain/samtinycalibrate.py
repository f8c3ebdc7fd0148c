"""Make the IoU that ``sam_tiny`` predicts the IoU that it reaches, on held-out patients.

``python -m trainers.pretrain.samtinycalibrate --data DIR --weights FILE`` changes the last layer of the
IoU head in place: a line for the single mask and one for the three of an ambiguous click.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from sam_infer.engines.base import Engine
from sam_infer.engines.registry import create_engine
from sam_infer.geometry import tight_box
from sam_infer.prompts.simulated import jitter_box, next_click
from sam_infer.types import Candidates, Prompts
from trainers.pretrain.calibrate import fit
from trainers.pretrain.cases import Case, held_out_cases
from trainers.pretrain.evaluate import with_clicks
from trainers.pretrain.export import SAM_TINY, export

_LAST = "mask_decoder.iou_prediction_head.layers.2."
_SINGLE, _THREE = slice(0, 1), slice(1, 4)


def gather(engine: Engine, case: Case, rng: np.random.Generator) -> list[Candidates]:
    """Answers to a tight box, a careless box, a first click and two corrective ones."""
    truth, embedding = case.truth, engine.encode(case.image)
    tight = tight_box(truth)
    assert tight is not None
    height, width = truth.shape
    boxes = [Prompts(box=tight), Prompts(box=jitter_box(tight, 0.15, rng, (height, width)))]
    answers = engine.decode(embedding, boxes)
    clicks: list[tuple[float, float, int]] = []
    before = None
    for _ in range(3):
        click = next_click(truth, np.zeros_like(truth) if before is None else before > 0)
        if click is None:
            break
        clicks.append(click)
        answers.append(engine.decode(embedding, [with_clicks(clicks, None, before)])[0])
        before = answers[-1].logits[answers[-1].best]
    return answers


def pairs(answers: list[Candidates], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N, 2): predicted and reached IoU of every mask of some answers."""
    found = []
    for answer in answers:
        for logits, predicted in zip(answer.logits, answer.iou, strict=True):
            mask = logits > 0
            found.append([float(predicted), float((mask & truth).sum() / max((mask | truth).sum(), 1))])
    return np.array(found, float).reshape(-1, 2)


def bend(state: dict[str, Tensor], outputs: slice, line: list[float]) -> None:
    """Put ``line[0] + line[1] * IoU`` after some outputs of the IoU head, in place."""
    state[_LAST + "weight"][outputs] *= line[1]
    state[_LAST + "bias"][outputs] = state[_LAST + "bias"][outputs] * line[1] + line[0]


def main(arguments: list[str] | None = None) -> None:
    """Parse, gather the answers of held-out patients, fit, write the file again."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain.samtinycalibrate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the labelled sets")
    parser.add_argument("--weights", type=Path, required=True, help="the file to calibrate, in place")
    parser.add_argument("--per-set", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    engine = create_engine("sam_tiny", weights=given.weights)
    rng = np.random.default_rng(0)
    single, three = [np.zeros((0, 2))], [np.zeros((0, 2))]
    for case in held_out_cases(given.data, given.per_set, 1):
        answers = gather(engine, case, rng)
        single.append(pairs([a for a in answers if len(a.iou) == 1], case.truth))
        three.append(pairs([a for a in answers if len(a.iou) == 3], case.truth))
    with safe_open(given.weights, "pt") as file:
        state = {key: file.get_tensor(key).float() for key in sorted(file.keys())}
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    lines = {}
    for name, outputs, parts in (("single", _SINGLE, single), ("three", _THREE, three)):
        predicted, reached = np.concatenate(parts).T
        lines[name] = fit(predicted[:, None], reached)
        bend(state, outputs, lines[name])
        after = lines[name][0] + lines[name][1] * predicted
        errors = [np.abs(some - reached).mean() for some in (predicted, after)]
        print(f"{name}: {len(reached)} masks, IoU error {errors[0]:.3f} -> {errors[1]:.3f}")
    export(state, given.weights, facts | {"iou_lines": lines}, SAM_TINY)
    print(f"iou_lines = {lines}")


if __name__ == "__main__":
    main()
