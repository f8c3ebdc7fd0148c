"""What one step of SAM-Mix learns from: what is on slices, and masks that the classifier's maps ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sam_infer.autocam import cam_parts
from sam_infer.networks.classifier import activation_maps, on_slice
from sam_infer.prompts.activation import THRESHOLD
from sam_infer.tuning.mixfile import MixNetwork
from sam_infer.types import Prompts
from trainers.augment import Augmentation
from trainers.loop import State, Step
from trainers.presence import PresenceSlices, presence_batches, presence_loss
from trainers.samgiven import asked_of, given_masks
from trainers.samrounds import bce_dice, losses
from trainers.samviews import Frame, View, view_weights

#: Weight of the segmentation's loss; its Dice has this one in the authors' later code.
SEGMENTATION_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class MixView:
    """One object on one slice, as SAM and as the classifier see it.

    Args:
        view: The whole slice with the object's truth.
        pixels: (S, S) uint8, the classifier's input, 255 = the window's upper end.
        output: Index of the object's label among the classifier's outputs.
    """

    view: View
    pixels: NDArray[np.uint8]
    output: int


def mix_step(
    slices: PresenceSlices,
    views: Sequence[MixView],
    *,
    frame: Frame,
    batch: int,
    augment: Augmentation | None = None,
    threshold: float = THRESHOLD,
    weight: float = SEGMENTATION_WEIGHT,
) -> Step:
    """A step of SAM-Mix: classification on all slices, segmentation on those with masks.

    After Ward and Imran (arXiv 2412.08575): the classifier, as it is now, looks at the slices with masks. The
    box of what stands out prompts SAM, what stands out is SAM's attention, and the answer is compared with
    the mask. No gradient goes through box and attention. Their loss of the segmentation is not known; that
    binary cross entropy and the squared error of the predicted IoU stand beside Dice
    (`trainers.samrounds.losses`) is this project's own choice, as are the equal numbers of slices of both
    kinds.

    Args:
        slices: What the classifier learns from.
        views: What the segmentation learns from.
        frame: What SAM makes of a slice.
        batch: Slices of each kind per step.
        augment: Random changes to the classifier's slices; None = none.
        threshold: Least value of the activation map in what prompts.
        weight: Of the segmentation's loss; the classification's has 1.

    Returns:
        A step for a `sam_infer.tuning.mixfile.MixNetwork`.
    """
    draw = presence_batches(slices, batch=batch, augment=augment)
    weights = view_weights([one.view for one in views])

    def step(state: State) -> Tensor:
        network = state.network
        assert isinstance(network, MixNetwork)
        narrow = state.precision == "bfloat16"
        images, wanted = draw(state)
        drawn = torch.multinomial(weights, batch, replacement=True, generator=state.generator).tolist()
        chosen = [views[n] for n in drawn]
        seen = torch.from_numpy(np.stack([one.pixels for one in chosen]))[:, None].to(state.device)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=narrow):
            logits, maps = activation_maps(network.classifier, torch.cat([images, seen.float() / 255.0]))
        looked = maps[len(images) :][torch.arange(len(chosen)), [one.output for one in chosen]]
        prompted = prompted_views(chosen, looked, threshold=threshold)
        asked = asked_of(prompted, frame, state.device)
        masks, iou = given_masks(network.learner, prompted, asked, frame, narrow=narrow)
        wrong, _ = losses(masks, iou, asked, masks_of=frame.framing.masks, criterion=bce_dice)
        return presence_loss(logits[: len(images)], wanted) + weight * wrong.mean()

    return step


def prompted_views(views: Sequence[MixView], maps: Tensor, *, threshold: float) -> list[View]:
    """Views with what activation maps prompt: the box of the part with the peak, and the part as attention.

    Where a map shows nothing the box covers the middle half of the slice, as in the authors' later code, and
    there is no attention (own choice). Only learning needs that: where the model is used, no evidence gives
    no prompt.

    Args:
        views: What was looked at.
        maps: (n, h, w) float32 in 0..1, on the classifier's grid.
        threshold: See `sam_infer.prompts.activation.activation_parts`.
    """
    side = views[0].pixels.shape[0]
    grown = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    found = []
    for one, square in zip(views, grown, strict=True):
        activation = on_slice(square, *one.view.size)
        if activation is None:
            given = central_prompts(*one.view.size)
        else:
            given = cam_parts(activation, threshold=threshold, attention=True)[0].prompts
        found.append(replace(one.view, given=given))
    return found


def central_prompts(height: int, width: int) -> Prompts:
    """A box over the middle half of a slice of ``height`` x ``width`` pixels, and attention to nothing."""
    box = ((width - 1) / 4, (height - 1) / 4, 3 * (width - 1) / 4, 3 * (height - 1) / 4)
    return Prompts(box=box, attention=np.zeros((height, width), np.float32))
