"""Prompts from a classifier of image-level labels: its training on a set, and how good its boxes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.papers.learners import slices_of
from bench.papers.sets import Sample
from sam_infer.autocam import cam_parts
from sam_infer.geometry import tight_box
from sam_infer.networks.classifier import SIZE, ClassifierModel, build_classifier
from sam_infer.prompts.activation import activation_box, box_iou
from sam_infer.types import Box, FloatArray, Prompts
from trainers.augment import Augmentation
from trainers.camscore import THRESHOLDS
from trainers.loop import Settings, train
from trainers.presence import PresenceSlices, presence_step

_NO_LIMIT = 1e9
#: A box that overlaps more than this with the true one is counted as good.
GOOD = 0.5


def learn_classifier(
    samples: Sequence[Sample], *, labels: Mapping[str, int], steps: int, precision: str, seed: int
) -> ClassifierModel:
    """Train a classifier on whether labels are on images; their masks are not looked at.

    Args:
        samples: The images; of their truth only which labels occur is used.
        labels: Label name to value.
        steps: Optimiser steps, eight images each.
        precision: See `trainers.loop.Settings`.
        seed: Of the first weights, the batches and the random changes.

    Returns:
        The model; ``training`` tells the seconds it took.
    """
    blank = {sample.name: np.zeros_like(sample.truth) for sample in samples}
    source = slices_of(samples, blank, labels=labels, size=SIZE)
    there = [[value in sample.present for value in labels.values()] for sample in samples]
    slices = PresenceSlices(source=source, cases=source.cases, table=np.array(there, np.float32))
    torch.manual_seed(seed)
    settings = Settings(iterations=steps, max_seconds=_NO_LIMIT, seed=seed, precision=precision, epochs=1)
    done = train(
        build_classifier(labels=len(labels)), presence_step(slices, augment=Augmentation()), settings
    )
    return ClassifierModel(
        network=done.network.requires_grad_(False),
        labels=labels,
        training={"seconds": done.seconds, "seed": seed},
    )


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a classifier says of an image; nothing of it comes from the truth.

    Args:
        present: Whether it says that the label is there.
        activation: (H, W) float32 in 0..1, where it looks for the label; None where that shows nothing.
        prompts: The box of the part with the map's peak, and the part as attention; None without a map.
    """

    present: bool
    activation: FloatArray | None
    prompts: Prompts | None


def look(model: ClassifierModel, sample: Sample, *, threshold: float) -> Look:
    """Let a classifier of one label look at an image.

    Args:
        model: Of one label.
        sample: Its truth is not looked at.
        threshold: Least value of the map in what prompts.
    """
    (label,) = model.labels
    activation = model.activation(sample.image, sample.window, 0, label)
    parts = [] if activation is None else cam_parts(activation, threshold=threshold, attention=True)
    return Look(
        present=bool(model.presence(sample.image, sample.window)[0, 0] >= model.threshold),
        activation=activation,
        prompts=parts[0].prompts if parts else None,
    )


def true_box(sample: Sample) -> Box | None:
    """The tight box of all that an image holds of its one label."""
    return tight_box(sample.truth > 0)


def box_overlap(box: Box | None, sample: Sample) -> float | None:
    """IoU of a box with the true one; 0 without a box, None where there is nothing to find."""
    true = true_box(sample)
    if true is None:
        return None
    return 0.0 if box is None else box_iou(box, true)


def quality(looks: Mapping[str, Look], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """How good the boxes are at each of `trainers.camscore.THRESHOLDS`.

    Args:
        looks: By image name.
        samples: The images; only those with the label count.

    Returns:
        For each threshold ``threshold``, ``iou`` (mean) and ``good`` (share above `GOOD`).
    """
    out = []
    for threshold in THRESHOLDS:
        found = []
        for sample in samples:
            activation = looks[sample.name].activation
            box = None if activation is None else activation_box(activation, threshold=threshold)
            overlap = box_overlap(box, sample)
            if overlap is not None:
                found.append(overlap)
        good = float(np.mean(np.array(found) > GOOD))
        out.append({"threshold": threshold, "iou": float(np.mean(found)), "good": good})
    return out


def recognised(looks: Mapping[str, Look], samples: Sequence[Sample]) -> dict[str, float]:
    """The shares of images with and without the label that are recognised; nan where there are none."""
    found = {}
    for name, wanted in (("present", True), ("absent", False)):
        right = [looks[s.name].present == wanted for s in samples if bool(s.present) == wanted]
        found[name] = float(np.mean(right)) if right else float("nan")
    return found
