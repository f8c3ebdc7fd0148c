"""U-Nets from label maps: every training of both tables is one of these, from scratch, by the shared loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.papers.sets import LabelImage, Sample
from sam_infer.geometry import slice_image
from sam_infer.networks.unet import UnetModel, build_unet, to_square, windowed_slices
from trainers.augment import Augmentation
from trainers.data import Slices
from trainers.loop import Settings, Step, train
from trainers.steps import mean_teacher_step, supervised_step

_NO_LIMIT = 1e9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How each U-Net is trained; the same for all rows of a table.

    Args:
        size: Longest side in pixels of what the network sees.
        iterations: Optimiser steps.
        batch: Images per step.
        precision: Of the network's products, see `trainers.loop.Settings`.
    """

    size: int
    iterations: int
    batch: int
    precision: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A trained network.

    Args:
        model: The network with its labels.
        seconds: That its training took.
    """

    model: UnetModel
    seconds: float

    def predict(self, sample: Sample) -> LabelImage:
        """(H, W) uint8: the labels of an image at its own resolution."""
        labelmap = self.model.predict_volume(sample.image, sample.window).labelmap
        return np.ascontiguousarray(slice_image(labelmap, 0))


def slices_of(
    samples: Sequence[Sample], maps: Mapping[str, LabelImage], *, labels: Mapping[str, int], size: int
) -> Slices:
    """Images and label maps at the network's resolution.

    Args:
        samples: At least one.
        maps: Image name to (H, W) uint8 label values.
        labels: Label name to value.
        size: Longest side in pixels.
    """
    table = np.zeros(256, np.uint8)
    table[list(labels.values())] = np.arange(1, len(labels) + 1)
    groups = {name: number for number, name in enumerate(sorted({s.group for s in samples}))}
    images, channels = [], []
    for sample in samples:
        pixels = torch.from_numpy(windowed_slices(sample.image, sample.window, [0]))[:, None]
        images.append((to_square(pixels, size)[0, 0] * 255).round().to(torch.uint8).numpy())
        classes = torch.from_numpy(table[maps[sample.name]])[None, None]
        channels.append(to_square(classes, size)[0, 0].numpy())
    cases = np.array([groups[sample.group] for sample in samples], np.int64)
    return Slices(images=np.stack(images), labels=np.stack(channels), cases=cases)


def truths(samples: Sequence[Sample]) -> dict[str, LabelImage]:
    """The truth of images that a person has labelled."""
    return {sample.name: sample.truth for sample in samples}


def learn(
    samples: Sequence[Sample],
    maps: Mapping[str, LabelImage],
    *,
    labels: Mapping[str, int],
    recipe: Recipe,
    seed: int,
) -> Learned:
    """Train a network on label maps.

    Args:
        samples: The images.
        maps: Image name to (H, W) uint8 label values.
        labels: Label name to value.
        recipe: How.
        seed: Of the first weights, the batches and the random changes.
    """
    slices = slices_of(samples, maps, labels=labels, size=recipe.size)
    step = supervised_step(slices, classes=len(labels), batch=recipe.batch, augment=Augmentation())
    return _run(step, labels=labels, recipe=recipe, seed=seed)


def learn_as_mean_teacher(
    labelled: Sequence[Sample],
    pool: Sequence[Sample],
    *,
    labels: Mapping[str, int],
    recipe: Recipe,
    seed: int,
) -> Learned:
    """Train on labelled images and on a pool whose truth is not given.

    Args:
        labelled: With truth.
        pool: Without; the step gets empty label maps of them.
        labels: Label name to value.
        recipe: How.
        seed: As in `learn`.
    """
    known = slices_of(labelled, truths(labelled), labels=labels, size=recipe.size)
    blank = {sample.name: np.zeros_like(sample.truth) for sample in pool}
    unknown = slices_of(pool, blank, labels=labels, size=recipe.size)
    step = mean_teacher_step(known, unknown, classes=len(labels), batch=recipe.batch, augment=Augmentation())
    return _run(step, labels=labels, recipe=recipe, seed=seed)


def _run(step: Step, *, labels: Mapping[str, int], recipe: Recipe, seed: int) -> Learned:
    torch.manual_seed(seed)
    settings = Settings(
        iterations=recipe.iterations, max_seconds=_NO_LIMIT, seed=seed, precision=recipe.precision
    )
    done = train(build_unet(labels=len(labels)), step, replace(settings, epochs=1))
    model = UnetModel(
        network=done.network,
        labels=labels,
        size=recipe.size,
        training={"seconds": done.seconds, "seed": seed},
    )
    return Learned(model=model, seconds=done.seconds)
