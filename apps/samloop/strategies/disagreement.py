"""`disagreement`: the case on which the model and the promptable engine that refines it differ most."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from apps.samloop.strategies.scored import Judge, Scored
from apps.samloop.strategies.survey import ReadImage, WindowFor
from apps.samloop.strategies.uncertainty import UNTRAINED
from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import put_slice, slice_image
from sam_infer.intensity import Window
from sam_infer.networks.unet import UnetModel
from sam_infer.prompts.masks import cleaned_labelmap
from sam_infer.prompts.request import spread
from sam_infer.refine import labelled, refine_slice
from sam_infer.types import Candidates, Prompts
from sam_infer.volumes import Image, empty_labelmap
from trainers.evaluate import dice_per_label

#: Evenly spaced slices on which the U-Net is asked what they hold.
LOOKED_AT = 32
#: Evenly spaced slices of those that hold something, on which the engine is asked.
REFINED = 8


class Disagreement(Scored):
    """The open case on which the U-Net's labels and their refinement by the engine differ most.

    A committee of two: the case on which its members disagree most is asked about (query by committee, Seung
    et al., 1992, COLT). That the members are a network and the engine that it prompts, and Dice as the
    measure, are this project's own choice.

    Args:
        model: The published model, or None while there is none.
        encoder: The engine behind its caches.
        window_for: The window of an image for a request.
        read: Path to image; a cached reader.
        candidates: Open cases looked at per call, a random subset.
        seconds: No further case is looked at after this time.
    """

    def __init__(
        self,
        *,
        model: Callable[[], UnetModel | None],
        encoder: SliceEncoder,
        window_for: WindowFor,
        read: ReadImage,
        candidates: int = 30,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(
            name="disagreement",
            figure="disagreement",
            chosen="most disputed",
            highest=True,
            read=read,
            window_for=window_for,
            candidates=candidates,
            seconds=seconds,
            description="Open case on which the U-Net and its refinement by the engine differ most",
        )
        self._model = model
        self._encoder = encoder

    def _judge(self) -> Judge | str:
        model = self._model()
        if model is None:
            return UNTRAINED
        engine = self._encoder.engine
        return Judge(
            figure=functools.partial(disagreement, model, self._encoder),
            fingerprint=f"{model.fingerprint} {engine.fingerprint}",
            facts={"model": model.fingerprint, "engine": engine.name},
        )


def disagreement(model: UnetModel, encoder: SliceEncoder, image: Image, window: Window) -> float:
    """How much a model and its refinement differ on an image.

    Up to `LOOKED_AT` evenly spaced slices are labelled by the model; up to `REFINED` of those that hold
    something are refined, each by itself.

    Returns:
        1 - mean Dice over the labels that either finds there; 0 where neither finds any.
    """
    slices = spread(list(range(image.shape[2])), LOOKED_AT)
    found = model.predict_volume(_part(image, slices), window, certainty=True)
    holding = spread(np.flatnonzero(found.labelmap.any(axis=(0, 1))).tolist(), REFINED)
    if not holding:
        return 0.0
    assert found.certainty is not None
    own = found.labelmap[:, :, holding]
    refined = empty_labelmap((*image.shape[:2], len(holding)))
    for n, at in enumerate(holding):
        here = slice(at, at + 1)
        masks = cleaned_labelmap(found.labelmap[:, :, here], found.certainty[:, :, here])
        put_slice(refined, n, _refined(slice_image(masks, 0), encoder, image, window, slices[at]))
    values = dice_per_label(refined, own, model.labels).values()
    either = [value for value in values if not math.isnan(value)]
    return 1.0 - sum(either) / len(either)


def _part(image: Image, slices: Sequence[int]) -> Image:
    return image if len(slices) == image.shape[2] else replace(image, array=image.array[:, :, slices])


def _refined(
    labels: NDArray[np.uint8], encoder: SliceEncoder, image: Image, window: Window, k: int
) -> NDArray[np.uint8]:
    """(H, W) labels of slice ``k`` as the engine has them, where the model prompts it."""

    def decode(prompts: Sequence[Prompts]) -> list[Candidates]:
        return encoder.decode(image, k, window, prompts)

    masks = {int(value): labels == value for value in np.unique(labels) if value}
    refined = refine_slice(masks, decode)
    kept = {value: mask for value, mask in masks.items() if value not in refined}
    height, width = labels.shape
    return labelled(refined, kept, (height, width))
