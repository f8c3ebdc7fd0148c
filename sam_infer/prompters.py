"""Automatic prompts: what looks at a slice and says, for each label, where it may be.

Konwer et al. (arXiv 2503.04639) take theirs from BiomedCLIP. That a U-Net or a classifier may give them as
well is this project's own: the method needs some box, wherever it is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sam_infer.autoclip import ClipOptions, Look
from sam_infer.clip.model import ClipModel
from sam_infer.clip.regions import clip_part, kept_parts
from sam_infer.geometry import slice_image
from sam_infer.intensity import Window
from sam_infer.networks.classifier import ClassifierModel
from sam_infer.networks.unet import UnetModel, grey
from sam_infer.parts import Part
from sam_infer.prompts.activation import activation_parts
from sam_infer.prompts.masks import cleaned
from sam_infer.volumes import Image


class Prompter(Protocol):
    """Whatever prompts without anyone. Implementations are safe to call from threads."""

    @property
    def name(self) -> str:
        """Which one it is."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its prompts may change."""

    def parts(self, image: Image, window: Window, k: int) -> dict[str, Part]:
        """One part of a slice for each label that it sees there.

        Args:
            image: The image.
            window: How its values become 0..1.
            k: Slice index.
        """


@dataclass(frozen=True, kw_only=True)
class NetPrompter:
    """The box around all large parts of what a U-Net sees.

    Args:
        model: The U-Net.
    """

    model: UnetModel
    name: str = "unet"

    @property
    def fingerprint(self) -> str:
        """Of the U-Net."""
        return self.model.fingerprint

    def parts(self, image: Image, window: Window, k: int) -> dict[str, Part]:
        """See `Prompter`."""
        masks = cleaned(self.model.probabilities(image, window, k), keep="parts")
        found = {name: Part.of_mask(mask) for name, mask in zip(self.model.labels, masks, strict=True)}
        return {name: part for name, part in found.items() if part is not None}


@dataclass(frozen=True, kw_only=True)
class CamPrompter:
    """The box around the part of a classifier's activation map that has its peak.

    Args:
        model: The classifier.
    """

    model: ClassifierModel
    name: str = "cam"

    @property
    def fingerprint(self) -> str:
        """Of the classifier."""
        return self.model.fingerprint

    def parts(self, image: Image, window: Window, k: int) -> dict[str, Part]:
        """See `Prompter`."""
        present = self.model.presence(image, window, [k])[0]
        out = {}
        for name, probability in zip(self.model.labels, present, strict=True):
            if probability < self.model.threshold:
                continue
            activation = self.model.activation(image, window, k, name)
            part = None if activation is None else Part.of_mask(activation_parts(activation)[0])
            if part is not None:
                out[name] = part
        return out


@dataclass(frozen=True, kw_only=True)
class ClipPrompter:
    """The box of the largest region that a CLIP model sees for a label's description, and points in it.

    Maps that do not depend on the text prompt nothing (`sam_infer.clip.contrast`).

    Args:
        model: The CLIP model.
        texts: Label name to description.
        options: How it looks.
    """

    model: ClipModel
    texts: Mapping[str, str]
    options: ClipOptions
    name: str = "clip"

    @property
    def fingerprint(self) -> str:
        """Of the CLIP model, the descriptions and the options."""
        return f"{self.model.fingerprint} {sorted(self.texts.items())} {self.options}"

    def parts(self, image: Image, window: Window, k: int) -> dict[str, Part]:
        """See `Prompter`."""
        look = Look(self.model, window.apply(grey(slice_image(image.array, k))), self.options)
        out = {}
        for number, (name, text) in enumerate(self.texts.items()):
            seen = look.at(text)
            limits = self.options.contrast
            if seen is None or (limits is not None and not look.contrast(seen, limits).depends):
                continue
            rng = np.random.default_rng([self.options.seed, k, number])
            out[name] = clip_part(kept_parts(seen[1])[0], points=self.options.points, rng=rng)
        return out
