"""Boxes for prompts that are the same in all rows of a table: from the truth, carelessly, or from a U-Net."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from bench.papers.learners import Learned, learn, truths
from bench.papers.pseudo import clean_labels
from bench.papers.sets import Sample
from bench.papers.split import Draw
from bench.papers.study import Study
from sam_infer.errors import InputError
from sam_infer.geometry import tight_box
from sam_infer.prompts.simulated import jitter_box
from sam_infer.types import BoolArray, Box

BoxSource = Literal["careless", "unet"]
BOX_SOURCES: tuple[BoxSource, ...] = get_args(BoxSource)
#: Greatest move of a side over the box.
CARELESS = 0.25
FOLDS = 3


def whole_box(sample: Sample) -> Box:
    """The box of the whole image: it says nothing of the object."""
    height, width = sample.size
    return (0.0, 0.0, width - 1.0, height - 1.0)


def careless_box(sample: Sample) -> Box:
    """The box of all that is labelled, every side off by up to a quarter of it; fixed by the image's name.

    It is made from the truth and stands for a coarse source of boxes.
    """
    box = tight_box(sample.truth > 0)
    if box is None:
        return whole_box(sample)
    return jitter_box(box, CARELESS, np.random.default_rng(zlib.crc32(sample.name.encode())), sample.size)


def found_box(mask: BoolArray, sample: Sample) -> Box:
    """The box of what was found, (H, W) bool; of the whole image where that is nothing."""
    return tight_box(mask) or whole_box(sample)


def network_boxes(study: Study, draw: Draw, seed: int) -> dict[str, Box]:
    """The box of what a U-Net of the labelled images finds, for all images of a study.

    Boxes of the labelled images come from U-Nets that did not learn from them, so that they are as far off as
    those of other images are.

    Args:
        study: Its images; networks are kept in it.
        draw: Which of them are labelled.
        seed: Of the trainings.

    Raises:
        InputError: When there are too few labelled images to leave some out.
    """
    if len(draw.labelled) < 2:
        raise InputError(
            "labelled", len(draw.labelled), "boxes from a U-Net need two labelled images or more"
        )

    def trained(name: str, samples: Sequence[Sample]) -> Learned:
        def make() -> Learned:
            return learn(samples, truths(samples), labels=study.data.labels, recipe=study.recipe, seed=seed)

        return study.learned(name, len(draw.labelled), seed, make)

    folds = min(FOLDS, len(draw.labelled))
    seen: list[tuple[Learned, Sequence[Sample]]] = [
        (trained("unet", draw.labelled), (*draw.pool, *study.split.test))
    ]
    for fold in range(folds):
        rest = [sample for n, sample in enumerate(draw.labelled) if n % folds != fold]
        seen.append((trained(f"unet-without-{fold}", rest), draw.labelled[fold::folds]))
    return {
        sample.name: found_box(clean_labels(network, sample, "parts") > 0, sample)
        for network, samples in seen
        for sample in samples
    }
