"""Pseudo labels: a U-Net's own masks, cleaned, and refined by a promptable engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from bench.papers.learners import Learned, learn, truths
from bench.papers.records import Labels
from bench.papers.sets import LabelImage, Sample
from bench.papers.split import draw_labelled
from bench.papers.study import Study, decoder, masks_of
from bench.papers.walker import walked
from sam_infer.geometry import slice_image
from sam_infer.networks.unet import grey
from sam_infer.prompts.masks import Keep, cleaned
from sam_infer.refine import KEUTH, RefineLimits, Scheme, labelled, refine_slice

#: The filter that the authors did not use.
FILTER = RefineLimits(iou=0.6, agreement=0.5)
#: Longest side in pixels of the paper's images: dilations are told in its pixels.
PAPER_SIDE = 384
_MASKS = tuple[Labels, Labels]


class Cell:
    """One draw of labelled images with one seed: what its rows share, each made once.

    Args:
        study: What all cells share.
        n: Labelled images.
        seed: Of the draw and of the trainings.
    """

    def __init__(self, study: Study, n: int, seed: int) -> None:
        self.study = study
        self.n = n
        self.seed = seed
        self.draw = draw_labelled(study.split, n, seed)
        self._seen: dict[tuple[Keep | None, bool], Labels] = {}
        self._refined: dict[tuple[Scheme, bool], _MASKS] = {}

    @cached_property
    def first(self) -> Learned:
        """The U-Net of the labelled images."""
        return self.study.learned("unet", self.n, self.seed, lambda: self.learn(self.draw.labelled))

    def learn(self, samples: Sequence[Sample], maps: Mapping[str, LabelImage] | None = None) -> Learned:
        """A new U-Net from images and their label maps; None = their truth."""
        given = truths(samples) if maps is None else maps
        study = self.study
        return learn(samples, given, labels=study.data.labels, recipe=study.recipe, seed=self.seed)

    def masks(self, keep: Keep | None = None, *, test: bool = False) -> Labels:
        """What the first U-Net sees in the pool or in the test images: as it is (None) or cleaned."""
        if (keep, test) not in self._seen:
            samples = self.study.split.test if test else self.draw.pool
            first, start = self.first, time.monotonic()
            maps = {
                sample.name: first.predict(sample) if keep is None else clean_labels(first, sample, keep)
                for sample in samples
            }
            self._seen[keep, test] = Labels(maps=maps, seconds=first.seconds + time.monotonic() - start)
        return self._seen[keep, test]

    def refined(self, scheme: Scheme = KEUTH, *, test: bool = False) -> _MASKS:
        """Refined masks of the pool or of the test images: all answers, and those that pass `FILTER`."""
        if (scheme, test) not in self._refined:
            samples = self.study.split.test if test else self.draw.pool
            self._refined[scheme, test] = self._refine(samples, self.masks(scheme.keep, test=test), scheme)
        return self._refined[scheme, test]

    def walked(self) -> Labels:
        """Test masks after a random walk."""
        clean, start = self.masks("best", test=True), time.monotonic()
        maps = {}
        for sample in self.study.split.test:
            image = sample.window.apply(grey(slice_image(sample.image.array, 0)))
            maps[sample.name] = walked(image, clean.maps[sample.name])
        return Labels(maps=maps, seconds=clean.seconds + time.monotonic() - start)

    def _refine(self, samples: Sequence[Sample], masks: Labels, scheme: Scheme) -> _MASKS:
        start = time.monotonic()
        every, passed = {}, {}
        for sample in samples:
            here = masks_of(masks.maps[sample.name])
            scaled = replace(scheme, dilation=round(scheme.dilation * max(sample.size) / PAPER_SIDE))
            found = refine_slice(here, decoder(self.study, sample), scaled)
            kept = {value: mask for value, mask in here.items() if value not in found}
            believed = {value: one for value, one in found.items() if FILTER.passed(one)}
            every[sample.name] = labelled(found, kept, sample.size)
            passed[sample.name] = labelled(believed, kept, sample.size)
        seconds = masks.seconds + time.monotonic() - start
        return Labels(maps=every, seconds=seconds), Labels(maps=passed, seconds=seconds)


def clean_labels(learned: Learned, sample: Sample, keep: Keep) -> LabelImage:
    """(H, W) uint8: of each label the component of the highest mean probability, or all large ones."""
    out = np.zeros(sample.size, np.uint8)
    probabilities = learned.model.probabilities(sample.image, sample.window, 0)
    for value, mask in zip(learned.model.labels.values(), cleaned(probabilities, keep=keep), strict=True):
        out[mask] = value
    return out
