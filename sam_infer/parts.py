"""What a map of attention prompts: parts of a slice, asked of an engine in one call, and written down.

Shared by everything that looks at a slice, sees parts in which an object may lie, and prompts with them
(`sam_infer.autocam`, `sam_infer.autoclip`, `sam_infer.autotext`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import put_slice, tight_box
from sam_infer.intensity import Window
from sam_infer.overlap import dice
from sam_infer.prompts.masks import MaskPrompt
from sam_infer.refine import Refined, labelled
from sam_infer.types import BoolArray, Box, Prompts
from sam_infer.uncertainty import as_bytes, binary_entropy
from sam_infer.volumes import Image

#: What is told of a label.
Told = TypeVar("Told")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a slice that prompts.

    Args:
        mask: (H, W) bool, the part itself.
        box: (x0, y0, x1, y1) in slice pixels, tight.
        prompts: What the engine gets for it.
    """

    mask: BoolArray
    box: Box
    prompts: Prompts

    @classmethod
    def of_mask(cls, mask: BoolArray) -> Part | None:
        """A part that prompts with its tight box alone; None where the mask is empty."""
        box = tight_box(mask)
        return None if box is None else cls(mask=mask, box=box, prompts=Prompts(box=box))


@dataclass(frozen=True, kw_only=True)
class PartsAnswer:
    """The engine's answer for one label on one slice.

    Args:
        boxes: Of the parts, (x0, y0, x1, y1) in slice pixels, in the order in which they were given.
        iou: Predicted IoU, 0 to 1: the mean over the parts.
        agreement: Dice of the engine's mask with the parts.
    """

    boxes: list[Box]
    iou: float
    agreement: float

    def record(self) -> dict[str, Any]:
        """As replies tell it."""
        return {
            "boxes": [list(box) for box in self.boxes],
            "score": round(self.iou, 4),
            "agreement": round(self.agreement, 4),
        }


def mean_iou(answers: Iterable[PartsAnswer]) -> float | None:
    """Mean predicted IoU of answers; None where there is none."""
    found = [one.iou for one in answers]
    return float(np.mean(found)) if found else None


@dataclass(frozen=True, kw_only=True)
class AutoVolume(Generic[Told]):
    """What was found on an image without anyone's prompt.

    Args:
        labelmap: (I, J, K) uint8.
        labels: What became of each label that was looked for, by name.
        uncertainty: (I, J, K) uint8, the binary entropy of the most doubtful mask at each voxel, 255 = 1 bit,
            0 on slices where nothing was prompted; None where it was not asked for.
    """

    labelmap: NDArray[np.uint8]
    labels: dict[str, Told]
    uncertainty: NDArray[np.uint8] | None = None


def ask_parts(
    parts: Mapping[str, Sequence[Part]],
    image: Image,
    k: int,
    *,
    encoder: SliceEncoder,
    window: Window,
    zoom: bool | None,
) -> dict[str, tuple[PartsAnswer, Refined]]:
    """The engine's answer to the parts of all labels of a slice, in one call of it.

    Of each part the best candidate by predicted IoU is taken, and of several parts of a label the highest
    logit at each pixel.

    Args:
        parts: By label; at least one of each.
        image: The image.
        k: Slice index.
        encoder: The engine behind its caches.
        window: How the image's values become 0..1.
        zoom: Whether the engine looks at a crop around the boxes, see `SliceEncoder`.
    """
    prompts = [one.prompts for of in parts.values() for one in of]
    candidates = iter(encoder.decode(image, k, window, prompts, zoom=zoom))
    out = {}
    for name, of in parts.items():
        found = [next(candidates) for _ in of]
        logits = np.max([one.logits[one.best] for one in found], axis=0)
        iou = float(np.mean([one.iou[one.best] for one in found]))
        agreement = dice(logits > 0, np.any([one.mask for one in of], axis=0))
        none = np.zeros((0, 2), np.float32)
        given = tuple(MaskPrompt(box=one.box, positive=None, negatives=none) for one in of)
        mask = Refined(mask=logits > 0, logits=logits, iou=iou, prompts=given, agreement=agreement)
        out[name] = PartsAnswer(boxes=[one.box for one in of], iou=iou, agreement=agreement), mask
    return out


def put_answers(
    masks: Mapping[int, Refined], k: int, labelmap: NDArray[np.uint8], doubt: NDArray[np.uint8] | None
) -> None:
    """Write the answers of a slice into a label map, in place; where they overlap the highest logit wins.

    Args:
        masks: By the label's value; at least one.
        k: Slice index.
        labelmap: (I, J, K) uint8.
        doubt: (I, J, K) uint8, gets the binary entropy of the most doubtful mask at each pixel, 255 = 1 bit;
            None where nobody asked for it.
    """
    put_slice(labelmap, k, labelled(masks, {}, (labelmap.shape[1], labelmap.shape[0])))
    if doubt is not None:
        put_slice(doubt, k, as_bytes(np.max([binary_entropy(one.logits) for one in masks.values()], axis=0)))
