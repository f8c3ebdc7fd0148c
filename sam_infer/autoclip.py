"""A promptable engine, prompted by where a CLIP model looks for a label's description.

The visual prompts of Konwer et al. (CVPR 2025, arXiv 2503.04639), whose front end is MedCLIP-SAM's: a map
of saliency for the text, a coarse mask of it, and of that a box and points. They work on single images that
hold the object. A map tells where and never whether, so a slice without it is prompted too; ask for the
slices that hold it. Going through volumes slice by slice, several labels at once of which the highest logit
wins a pixel, and the contrast check (`sam_infer.clip.contrast`) are this project's own choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from sam_infer.clip.contrast import Contrast, Contrasted, contrasted
from sam_infer.clip.model import ClipModel
from sam_infer.clip.regions import POINTS, REGIONS, Keep, clip_part, kept_parts
from sam_infer.clip.saliency import SALIENCIES
from sam_infer.embeddings import SliceEncoder
from sam_infer.intensity import Window
from sam_infer.parts import AutoVolume, Part, PartsAnswer, ask_parts, mean_iou, put_answers
from sam_infer.types import BoolArray, FloatArray
from sam_infer.volumes import Image, empty_labelmap


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """What is prompted.

    Args:
        saliency: One of `sam_infer.clip.saliency.SALIENCIES`.
        region: One of `sam_infer.clip.regions.REGIONS`.
        keep: Which parts of the coarse mask are prompted, each by itself.
        points: Points inside each part; 0 = its box alone.
        contrast: When a map is not believed; None = it always is.
        slices: Slice indices to look at; None = all.
        seed: Of the points.
    """

    saliency: str = "gradcam"
    region: str = "crf"
    keep: Keep = "largest"
    points: int = POINTS
    contrast: Contrast | None = field(default_factory=Contrast)
    slices: Collection[int] | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ClipLabel:
    """What became of one label.

    Args:
        slices: The answers, by slice.
        contrast: How much each map looks like those of nonsense, by slice; empty where it was not asked.
        rejected: Slices whose map is not believed.
        silent: Slices on which the map is the same everywhere, or gives no region.
    """

    slices: dict[int, PartsAnswer] = field(default_factory=dict)
    contrast: dict[int, Contrasted] = field(default_factory=dict)
    rejected: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """Mean predicted IoU over the prompted slices; None where there is none."""
        return mean_iou(self.slices.values())


def auto_clip(
    image: Image,
    model: ClipModel,
    texts: Mapping[str, str],
    *,
    values: Mapping[str, int],
    encoder: SliceEncoder,
    window: Window,
    options: ClipOptions,
    zoom: bool | None = None,
    uncertainty: bool = False,
) -> AutoVolume[ClipLabel]:
    """Label an image from the descriptions of its labels.

    Args:
        image: A 2D image or a volume.
        model: The CLIP model.
        texts: The description of each label that is looked for, by its name.
        values: The value of each of these labels in the label map.
        encoder: The engine behind its caches.
        window: How the image's values become 0..1, for both.
        options: What is prompted.
        zoom: Whether the engine looks at a crop around the boxes, see `SliceEncoder`.
        uncertainty: Make the uncertainty map.
    """
    out = empty_labelmap(image.shape)
    doubt = empty_labelmap(image.shape) if uncertainty else None
    labels = {name: ClipLabel() for name in texts}
    for k in range(image.shape[2]) if options.slices is None else sorted(options.slices):
        look = Look(model, encoder.slice_values(image, k, window), options)
        parts: dict[str, list[Part]] = {}
        for name, text in texts.items():
            seen = look.at(text)
            if seen is None:
                labels[name].silent.append(k)
                continue
            if options.contrast is not None:
                verdict = look.contrast(seen, options.contrast)
                labels[name].contrast[k] = verdict
                if not verdict.depends:
                    labels[name].rejected.append(k)
                    continue
            rng = np.random.default_rng([options.seed, k, values[name]])
            kept = kept_parts(seen[1], options.keep)
            parts[name] = [clip_part(one, points=options.points, rng=rng) for one in kept]
        if not parts:
            continue
        found = ask_parts(parts, image, k, encoder=encoder, window=window, zoom=zoom)
        for name, (answer, _) in found.items():
            labels[name].slices[k] = answer
        put_answers({values[name]: one for name, (_, one) in found.items()}, k, out, doubt)
    return AutoVolume(labelmap=out, labels=labels, uncertainty=doubt)


class Look:
    """What the model sees on one slice; the maps of nonsense are made once for all labels."""

    def __init__(self, model: ClipModel, pixels: FloatArray, options: ClipOptions) -> None:
        self._model = model
        self._pixels = pixels
        self._saliency = SALIENCIES[options.saliency]
        self._region = REGIONS[options.region]
        self._nonsense: list[tuple[FloatArray, BoolArray] | None] | None = None

    def at(self, text: str) -> tuple[FloatArray, BoolArray] | None:
        """The map for a text and its region; None where there is none, or nothing on the slice at all."""
        if self._pixels.min() == self._pixels.max():
            return None
        saliency = self._saliency(self._model, self._pixels, text)
        if saliency is None:
            return None
        region = self._region(saliency, self._pixels)
        return (saliency, region) if region.any() else None

    def contrast(self, seen: tuple[FloatArray, BoolArray], limits: Contrast) -> Contrasted:
        """How much what is seen looks like what nonsense shows."""
        if self._nonsense is None:
            self._nonsense = [self.at(text) for text in limits.texts]
        return contrasted(*seen, self._nonsense, limits)
