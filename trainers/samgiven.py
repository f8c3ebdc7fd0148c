"""Learning from prompts that are always the same: boxes and points that nobody drew, text, attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sam_infer.tuning.learner import SamLearner
from sam_infer.types import FloatArray, Prompts
from trainers.loop import State, Step
from trainers.samrounds import Asked, Criterion, decode, focal_dice, losses
from trainers.samviews import Frame, View, features_of, view_weights


def given_step(views: Sequence[View], *, frame: Frame, batch: int, criterion: Criterion = focal_dice) -> Step:
    """A step of supervised tuning: what the given prompts are answered with is compared with the truth.

    As in the first stage of Konwer et al. (arXiv 2503.04639): 20 focal + Dice, and the squared error of the
    predicted IoU, as in SAM-Med2D's code.

    Args:
        views: With ``given`` prompts and known truth.
        frame: What the network makes of a slice.
        batch: Views per step.
        criterion: Of masks.

    Returns:
        A step for a `sam_infer.tuning.learner.SamLearner`.
    """
    weights = view_weights(views)

    def step(state: State) -> Tensor:
        drawn = torch.multinomial(weights, batch, replacement=True, generator=state.generator).tolist()
        chosen = [views[n] for n in drawn]
        asked = asked_of(chosen, frame, state.device)
        masks, iou = given_masks(state.network, chosen, asked, frame, narrow=state.precision == "bfloat16")
        wrong, _ = losses(masks, iou, asked, masks_of=frame.framing.masks, criterion=criterion)
        return wrong.mean()

    return step


def given_masks(
    learner: object, views: Sequence[View], asked: Asked, frame: Frame, *, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """All four masks (B, 4, S, S) and predicted IoU (B, 4) of views under their given prompts, float32."""
    assert isinstance(learner, SamLearner)
    device = next(learner.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        features = features_of(views, learner.sam, frame, device)
        return decode(learner.sam, features, asked, learner.extras)


def answered(masks: Tensor, iou: Tensor, frame: Frame, given: Prompts | None = None) -> Tensor:
    """(B, S, S) logits of the mask that answers: the single one, or the one of three of the highest IoU.

    Args:
        masks: (B, 4, S, S) logits.
        iou: (B, 4), predicted.
        frame: What the network makes of a slice.
        given: The prompts of one of them; the others' are of the same kinds, with as many points. None = they
            are more than one click.
    """
    several = frame.framing.masks == "three" if given is None else frame.framing.several(given)
    if not several:
        return masks[:, 0]
    best = 1 + iou[:, 1:].argmax(1)
    return masks[torch.arange(len(masks), device=masks.device), best]


def asked_of(views: Sequence[View], frame: Frame, device: torch.device) -> Asked:
    """The given prompts of views, which all have the same kinds of prompts and the same number of points."""
    some = [view.given for view in views if view.given is not None]
    if len(some) < len(views):
        raise ValueError("every view must have prompts of its own")
    truth = torch.from_numpy(np.stack([view.truth for view in views])).to(device).float() / 255.0
    count, side, framing = len(views), frame.side, frame.framing
    boxes, clicks, texts, maps = [], [], [], []
    for view, given in zip(views, some, strict=True):
        if given.box is not None:
            boxes.append(framing.boxes(np.array([given.box], np.float64), view.size, side)[0])
        places = framing.points(given.points, view.size, side)
        clicks.append(np.concatenate([places, given.point_labels[:, None]], axis=1))
        if given.text is not None:
            texts.append(given.text)
        if given.attention is not None:
            whole = torch.from_numpy(np.ascontiguousarray(given.attention))[None]
            maps.append(framing.padded(whole, side, frame.grid)[0])
    nothing = torch.full((count, 4), float("nan"), device=device)
    return Asked(
        owner=torch.arange(count, device=device),
        truth=truth,
        box=_stacked(boxes, device) if boxes else nothing,
        clicks=_stacked(clicks, device),
        first=nothing[:, :2],
        previous=torch.zeros_like(truth),
        text=_stacked(texts, device) if texts else None,
        attention=torch.stack(maps).to(device) if maps else None,
    )


def _stacked(rows: Sequence[FloatArray | np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(device)
