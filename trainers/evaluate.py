"""How good a model is: Dice on accepted cases that it never saw, at the images' own resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_infer.networks.unet import UnetModel
from sam_infer.volumes import read_image, read_labelmap
from trainers.data import Case, ReadImage, WindowFor


@dataclass(frozen=True, kw_only=True)
class Score:
    """Dice of one model.

    Args:
        dice: Mean over the labels of `per_label`, 0..1; nan where no label could be judged.
        per_label: Label name to the mean over the cases in which it occurs in truth or prediction; nan where
            it occurs nowhere.
        cases: Case id to label name to Dice; nan where the label is in neither truth nor prediction.
    """

    dice: float
    per_label: Mapping[str, float] = field(default_factory=dict)
    cases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON: figures rounded to 4 digits, nan as None."""

        def plain(value: float) -> float | None:
            return None if math.isnan(value) else round(value, 4)

        return {
            "dice": plain(self.dice),
            "per_label": {name: plain(v) for name, v in self.per_label.items()},
            "cases": {c: {n: plain(v) for n, v in row.items()} for c, row in self.cases.items()},
        }


def dice_per_label(
    prediction: NDArray[np.integer], truth: NDArray[np.integer], labels: Mapping[str, int]
) -> dict[str, float]:
    """Dice of each label of one case, 2D or 3D.

    Args:
        prediction: (I, J, K) label values.
        truth: (I, J, K) label values.
        labels: Label name to value.

    Returns:
        Label name to 0..1; nan where it is in neither, 0 where it is predicted and not there or the reverse.
    """
    from monai.metrics import compute_dice

    out = {}
    for name, value in labels.items():
        pair = [torch.from_numpy(np.ascontiguousarray(a == value))[None, None] for a in (prediction, truth)]
        found = compute_dice(pair[0], pair[1], include_background=True, ignore_empty=True)
        missing = not pair[1].any()
        out[name] = (0.0 if pair[0].any() else math.nan) if missing else float(found)
    return out


def summarize(cases: Mapping[str, Mapping[str, float]], labels: Sequence[str]) -> Score:
    """Means over cases, then over labels, leaving out what is nan."""
    per_label = {name: _mean([row[name] for row in cases.values()]) for name in labels}
    return Score(dice=_mean(list(per_label.values())), per_label=per_label, cases=cases)


def evaluate(
    model: UnetModel, cases: Sequence[Case], *, window_for: WindowFor, read: ReadImage = read_image
) -> Score:
    """Dice of a model on cases.

    Args:
        model: Its labels are the ones judged.
        cases: With accepted labels; none of them may have been trained on.
        window_for: The window of an image for an (empty) request.
        read: How an image file is read.
    """
    rows = {}
    for case in cases:
        image = read(case.image)
        truth = read_labelmap(case.label, image)
        predicted = model.predict_volume(image, window_for(image, {})).labelmap
        rows[case.case_id] = dice_per_label(predicted, truth, model.labels)
    return summarize(rows, list(model.labels))


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
