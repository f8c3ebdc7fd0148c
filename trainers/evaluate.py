"""How good a model is on accepted cases that it never saw, at the images' own resolution."""

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
    """What one model reaches, the higher the better.

    Args:
        value: Mean over the labels of `per_label`, 0..1; nan where no label could be judged.
        metric: What is measured, as records name it.
        per_label: Label name to the mean over the cases in which it occurs in truth or prediction; nan where
            it occurs nowhere.
        cases: Case id to label name to value; nan where the label is in neither truth nor prediction.
        nothing: What a model reaches that has learned nothing.
        unjudged: What is wrong with the cases where no label could be judged.
        figures: What else was measured, by name; nothing is decided by it.
    """

    value: float
    metric: str = "dice"
    per_label: Mapping[str, float] = field(default_factory=dict)
    cases: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    nothing: float = 0.0
    unjudged: str = "no held-out case holds any of the labels"
    figures: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON: figures rounded to 4 digits, nan as None."""

        def plain(value: float) -> float | None:
            return None if math.isnan(value) else round(value, 4)

        return {
            self.metric: plain(self.value),
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
    per_label = {name: mean([row[name] for row in cases.values()]) for name in labels}
    return Score(value=mean(list(per_label.values())), per_label=per_label, cases=cases)


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
        assert case.label is not None
        image = read(case.image)
        truth = read_labelmap(case.label, image)
        predicted = model.predict_volume(image, window_for(image, {})).labelmap
        rows[case.case_id] = dice_per_label(predicted, truth, model.labels)
    return summarize(rows, list(model.labels))


def mean(values: Sequence[float]) -> float:
    """Mean of what is not nan; nan where nothing is left."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
