"""A promptable engine, prompted by what a classifier looks at: presence, activation map, box, mask.

After Ward and Imran (SAM-Mix, arXiv 2412.08575): the classifier says whether an object is on a slice, the
part of its activation map that stands out (`sam_infer.prompts.activation`) becomes a box, and the box is the
prompt. The best of the engine's candidates is taken; how theirs is chosen is not known. They work on single
slices and one object. Here volumes are gone through slice by slice, and where the objects of several labels
overlap the highest logit wins; both are this project's own choice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from sam_infer.embeddings import SliceEncoder
from sam_infer.intensity import Window
from sam_infer.networks.classifier import ClassifierModel
from sam_infer.parts import AutoVolume, Part, PartsAnswer, ask_parts, mean_iou, put_answers
from sam_infer.prompts.activation import THRESHOLD, activation_parts
from sam_infer.types import FloatArray
from sam_infer.volumes import Image, empty_labelmap


@dataclass(frozen=True, kw_only=True)
class CamOptions:
    """What is prompted.

    Args:
        presence: Probability from which on a label counts as present; None = the model's own.
        threshold: Least value of the activation map in what becomes a box, above 0 up to 1.
        every: A box for each part of the map that reaches the threshold, not only for that with the peak.
        labels: Names of the labels to look for; None = all of the model's.
        attention: Whether the engine gets each part as attention too, beside its box: for one that learned to
            be prompted so (`sam_infer.tuning.mixfile`).
    """

    presence: float | None = None
    threshold: float = THRESHOLD
    every: bool = False
    labels: Collection[str] | None = None
    attention: bool = False


@dataclass(frozen=True, kw_only=True)
class CamLabel:
    """What became of one label.

    Args:
        presence: (K,) float32, the probability that it is on a slice.
        slices: The answers, by slice.
        silent: Slices on which it is present and the activation map shows nothing.
    """

    presence: FloatArray
    slices: dict[int, PartsAnswer] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """Mean predicted IoU over the prompted slices; None where there is none."""
        return mean_iou(self.slices.values())


def auto_cam(
    image: Image,
    model: ClassifierModel,
    *,
    encoder: SliceEncoder,
    window: Window,
    options: CamOptions,
    zoom: bool | None = None,
    uncertainty: bool = False,
) -> AutoVolume[CamLabel]:
    """Label an image from the classifier's activation maps.

    Args:
        image: A 2D image or a volume.
        model: The classifier.
        encoder: The engine behind its caches.
        window: How the image's values become 0..1, for both.
        options: What is prompted.
        zoom: Whether the engine looks at a crop around the boxes, see `SliceEncoder`.
        uncertainty: Make the uncertainty map.
    """
    threshold = model.threshold if options.presence is None else options.presence
    out = empty_labelmap(image.shape)
    doubt = empty_labelmap(image.shape) if uncertainty else None
    table = model.presence(image, window)
    names = [name for name in model.labels if options.labels is None or name in options.labels]
    columns = {name: table[:, n] for n, name in enumerate(model.labels)}
    labels = {name: CamLabel(presence=columns[name]) for name in names}
    for k in range(image.shape[2]):
        parts: dict[str, list[Part]] = {}
        for name in (name for name in names if columns[name][k] >= threshold):
            activation = model.activation(image, window, k, name)
            if activation is None:
                labels[name].silent.append(k)
            else:
                parts[name] = cam_parts(
                    activation,
                    threshold=options.threshold,
                    every=options.every,
                    attention=options.attention,
                )
        if not parts:
            continue
        found = ask_parts(parts, image, k, encoder=encoder, window=window, zoom=zoom)
        for name, (answer, _) in found.items():
            labels[name].slices[k] = answer
        put_answers({model.labels[name]: one for name, (_, one) in found.items()}, k, out, doubt)
    return AutoVolume(labelmap=out, labels=labels, uncertainty=doubt)


def cam_parts(
    activation: FloatArray, *, threshold: float = THRESHOLD, every: bool = False, attention: bool = False
) -> list[Part]:
    """The parts of an activation map that prompt, each with its box.

    Args:
        activation: (H, W) float32, 0 to 1, the peak at 1.
        threshold: See `CamOptions`.
        every: See `CamOptions`.
        attention: See `CamOptions`.

    Returns:
        Those of `sam_infer.prompts.activation.activation_parts`, in its order.
    """
    masks = activation_parts(activation, threshold=threshold, every=every)
    parts = [part for one in masks if (part := Part.of_mask(one)) is not None]
    if not attention:
        return parts
    return [
        replace(one, prompts=replace(one.prompts, attention=one.mask.astype(np.float32))) for one in parts
    ]
