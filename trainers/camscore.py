"""How good a classifier is on accepted cases that it never saw, and how good the boxes of its maps are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam_infer.geometry import slice_image, tight_box
from sam_infer.networks.classifier import ClassifierModel
from sam_infer.prompts.activation import activation_box, box_iou
from sam_infer.volumes import read_image, read_labelmap
from trainers.data import Case, ReadImage, WindowFor
from trainers.evaluate import Score, mean

#: Thresholds at which boxes are judged.
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
#: Slices of a case on which the boxes of one label are judged, at most; evenly spaced.
BOXED_SLICES = 12


def presence_score(
    model: ClassifierModel, cases: Sequence[Case], *, window_for: WindowFor, read: ReadImage = read_image
) -> Score:
    """Balanced accuracy of presence per slice, over all slices of all cases.

    Args:
        model: Judged at its own threshold.
        cases: With accepted labels; none of them may have been trained on.
        window_for: The window of an image for an (empty) request.
        read: How an image file is read.

    Returns:
        Per label the mean of sensitivity and specificity; nan where every slice holds it, or none. Per case
        and label the share of slices that are right.
    """
    found, wanted, rows = [], [], {}
    for case in cases:
        assert case.label is not None
        image = read(case.image)
        truth = read_labelmap(case.label, image)
        there = np.stack([(truth == value).any(axis=(0, 1)) for value in model.labels.values()], axis=1)
        said = model.presence(image, window_for(image, {})) >= model.threshold
        rows[case.case_id] = dict(zip(model.labels, (said == there).mean(axis=0).tolist(), strict=True))
        found.append(said)
        wanted.append(there)
    right, truth = np.concatenate(found) == np.concatenate(wanted), np.concatenate(wanted)
    per_label = {
        name: float(right[truth[:, n], n].mean() + right[~truth[:, n], n].mean()) / 2
        if 0 < truth[:, n].sum() < len(truth)
        else math.nan
        for n, name in enumerate(model.labels)
    }
    return Score(
        value=mean(list(per_label.values())),
        metric="balanced_accuracy",
        per_label=per_label,
        cases=rows,
        nothing=0.5,
        unjudged="every label is on all slices of the held-out cases, or on none",
    )


def box_quality(
    model: ClassifierModel, cases: Sequence[Case], *, window_for: WindowFor, read: ReadImage = read_image
) -> dict[str, Any]:
    """Intersection over union of the activation maps' boxes with the true ones, where a label is present.

    The true box is the tight one around all that a slice holds of a label. A map that shows nothing counts 0.

    Args:
        model: Any.
        cases: As for `presence_score`.
        window_for: The window of an image for an (empty) request.
        read: How an image file is read.

    Returns:
        For JSON: ``box_iou``, by threshold the mean over the labels; ``box_iou_per_label``, by label the mean
        over the slices at each threshold, and ``slices``, their number.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in model.labels}
    for case in cases:
        assert case.label is not None
        image = read(case.image)
        truth, window = read_labelmap(case.label, image), window_for(image, {})
        for name, value in model.labels.items():
            holding = np.flatnonzero((truth == value).any(axis=(0, 1)))
            count = min(len(holding), BOXED_SLICES)
            for k in holding[np.linspace(0, len(holding) - 1, count).round().astype(int)].tolist():
                true = tight_box(slice_image(truth, k) == value)
                activation = model.activation(image, window, k, name)
                boxes = [
                    None if activation is None else activation_box(activation, threshold=t)
                    for t in THRESHOLDS
                ]
                found[name].append([0.0 if b is None or true is None else box_iou(b, true) for b in boxes])
    per_label = {name: np.mean(rows, axis=0).tolist() for name, rows in found.items() if rows}
    means = np.mean(list(per_label.values()), axis=0).tolist() if per_label else []
    return {
        "box_iou": _by_threshold(means),
        "box_iou_per_label": {
            name: {**_by_threshold(row), "slices": len(found[name])} for name, row in per_label.items()
        },
    }


def _by_threshold(values: Sequence[float]) -> dict[str, float]:
    return {str(t): round(v, 4) for t, v in zip(THRESHOLDS, values, strict=False)}
