"""Pseudo labels from a simulated annotator: prompts for known masks, answered by the study's engine."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from bench.papers.records import Annotation, Labels
from bench.papers.sets import LabelImage, Sample
from bench.papers.statistics import Judged
from bench.papers.study import Study, decoder, masks_of
from sam_infer.prompts.annotator import BOX_CLICKS, STRATEGIES
from sam_infer.types import Prompts

#: Prompts that are decoded at once: bounds memory, 32 of 512 x 512 are 32 MB of logits and more inside.
_BATCH = 32


def annotated(study: Study, strategy: str, samples: Sequence[Sample]) -> Labels:
    """Labels of images by a prompt strategy; each image's are made once a run and do not depend on seeds.

    Args:
        study: Its engine answers.
        strategy: A name of `sam_infer.prompts.annotator.STRATEGIES`.
        samples: Their truth is what the annotator wants.
    """
    found = {sample.name: _annotation(study, strategy, sample) for sample in samples}
    return Labels(
        maps={name: one.labels for name, one in found.items()},
        seconds=sum(one.seconds for one in found.values()),
        clicks=sum(one.clicks for one in found.values()),
    )


def _annotation(study: Study, strategy: str, sample: Sample) -> Annotation:
    key = (strategy, sample.name)
    if key not in study.annotations:
        study.annotations[key] = _annotate(study, strategy, sample)
    return study.annotations[key]


def _annotate(study: Study, strategy: str, sample: Sample) -> Annotation:
    start = time.monotonic()
    asked: list[tuple[int, Prompts]] = []
    for value, mask in masks_of(sample.truth).items():
        rng = np.random.default_rng(zlib.crc32(f"{strategy} {sample.name} {value}".encode()))
        asked += [(value, prompt) for prompt in STRATEGIES[strategy].give(mask, rng)]
    out, highest = np.zeros(sample.size, np.uint8), np.zeros(sample.size, np.float32)
    decode = decoder(study, sample)
    for first in range(0, len(asked), _BATCH):
        some = asked[first : first + _BATCH]
        for (value, _), answer in zip(some, decode([prompt for _, prompt in some]), strict=True):
            logits = answer.logits[answer.best]
            won = logits > highest
            out[won], highest[won] = value, logits[won]
    clicks = sum(len(prompt.points) + BOX_CLICKS * (prompt.box is not None) for _, prompt in asked)
    return Annotation(labels=out, clicks=clicks, seconds=time.monotonic() - start)


def noisy(sample: Sample, judged: Judged, labels: Mapping[str, int], *, seed: int) -> LabelImage:
    """The truth with each mask eroded or dilated at random until it is as wrong as another labelling is.

    Of a mask of A pixels the A d / (2 - d) innermost are left, or the nearest of the background are added up
    to A (2 - d) / d: both is a Dice of d. Matching each mask by itself is this project's own choice.

    Args:
        sample: With the truth.
        judged: The other labelling's figures on this image.
        labels: Label name to value.
        seed: Of the choice between erosion and dilation, both as likely.

    Returns:
        (H, W) uint8 label values.
    """
    rng = np.random.default_rng([seed, zlib.crc32(sample.name.encode())])
    out = sample.truth.copy()
    for name, wanted in judged["dice"].items():
        truth = sample.truth == labels[name]
        area = int(truth.sum())
        if rng.random() < 0.5 and wanted > 0:
            free = out == 0
            grown = min(round(area * (2 - wanted) / wanted) - area, int(free.sum()))
            far = np.where(free, ndimage.distance_transform_edt(~truth), np.inf).ravel()
            out.ravel()[np.argsort(far, kind="stable")[:grown]] = labels[name]
        else:
            gone = area - round(area * wanted / (2 - wanted))
            depth = np.where(truth, ndimage.distance_transform_edt(np.pad(truth, 1))[1:-1, 1:-1], np.inf)
            out.ravel()[np.argsort(depth.ravel(), kind="stable")[:gone]] = 0
    return out
