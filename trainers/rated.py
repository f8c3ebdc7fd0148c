"""Candidates that somebody preferred one to another, as what the loss of preference needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam_infer.candidates import Source, by_dropout, by_masks, by_thresholds, ranked_by_mask
from sam_infer.candidatesources import DROPPED, PASSES
from sam_infer.tuning.learner import SamLearner
from sam_infer.types import BoolArray, Candidates, FloatArray
from trainers.loop import State, Step
from trainers.preferencestep import coefficients, preference_loss, score_weights
from trainers.samgiven import answered, asked_of, given_masks
from trainers.samrounds import decode
from trainers.samviews import HALF, Frame, View, features_of, low_truth

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Rated:
    """One object whose candidates were preferred one to another.

    Args:
        view: With the prompts that the candidates were made from.
        c: (S, S) float32 on the network's grid of masks: how much each pixel is to become foreground (> 0) or
            background (< 0); `trainers.preferencestep.coefficients`.
        reference: (S, S) float32 logits of the model that is improved upon.
    """

    view: View
    c: Tensor
    reference: Tensor


def reference_logits(reference: SamLearner, views: Sequence[View], frame: Frame) -> Tensor:
    """(n, S, S) float32 logits on the CPU of what a model answers to the given prompts of views."""
    reference.eval()
    device = next(reference.parameters()).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(views), _BATCH):
            some = views[start : start + _BATCH]
            masks, iou = given_masks(reference, some, asked_of(some, frame, device), frame)
            found.append(answered(masks, iou, frame, some[0].given).cpu())
    return torch.cat(found).clone() if found else torch.zeros(0, frame.low, frame.low)


def rated_by_truth(
    reference: SamLearner,
    views: Sequence[View],
    frame: Frame,
    *,
    source: Source = "thresholds",
    seed: int = 0,
) -> list[Rated]:
    """What accepted masks say of a model's candidates: the one most like the accepted mask is best.

    Candidates are made on the network's grid of masks; the published method has them at the image's
    resolution.

    Args:
        reference: The model that is improved upon.
        views: With given prompts, all of the same kinds, and truth.
        frame: What the network makes of a slice.
        source: What makes the candidates: thresholds of the answer's probability, SAM's three masks, or four
            answers of which each lost some values of the embedding.
        seed: Of what they lose.
    """
    logits = reference_logits(reference, views, frame)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for view, one in zip(views, logits, strict=True):
        if source == "thresholds":
            masks = by_thresholds(torch.sigmoid(one).numpy()).masks
        elif source == "masks":
            masks = by_masks(three_masks(reference, view, frame)).masks
        else:
            masks = by_dropout(dropped_logits(reference, view, frame, generator)).masks
        masks = masks & (low_truth(np.ones(view.size, bool), frame) > HALF)
        ranking = ranked_by_mask(masks, view.truth > HALF)
        best_first = torch.from_numpy(masks[list(ranking)])
        out.append(Rated(view=view, c=coefficients(best_first[None])[0], reference=one))
    return out


@torch.inference_mode()
def three_masks(learner: SamLearner, view: View, frame: Frame) -> Candidates:
    """SAM's three masks of a view under its given prompts, which need not be what it answers them with."""
    device = next(learner.parameters()).device
    masks, iou = given_masks(learner, [view], asked_of([view], frame, device), frame)
    return Candidates(logits=masks[0, 1:].cpu().numpy(), iou=iou[0, 1:].clamp(0, 1).cpu().numpy())


@torch.inference_mode()
def dropped_logits(learner: SamLearner, view: View, frame: Frame, generator: torch.Generator) -> FloatArray:
    """(PASSES, S, S) float32 logits of answers from an embedding of which each pass loses another part.

    As `sam_infer.candidatesources.stochastic_logits`, on the network's grid.
    """
    device = next(learner.parameters()).device
    features = features_of([view], learner.sam, frame, device)
    asked, out = asked_of([view], frame, device), []
    for _ in range(PASSES):
        kept = (torch.rand(features.shape, generator=generator) >= DROPPED).to(device) / (1 - DROPPED)
        masks, iou = decode(learner.sam, features * kept, asked, learner.extras)
        out.append(answered(masks, iou, frame, view.given)[0].cpu().numpy())
    return np.stack(out)


def rated_by_people(
    reference: SamLearner, view: View, masks: BoolArray, scores: Sequence[float], frame: Frame
) -> Rated:
    """What somebody said of candidates.

    Args:
        reference: The model that is improved upon.
        view: With the prompts that the candidates were made from.
        masks: (N, H, W) bool, at the slice's own resolution.
        scores: Of each candidate, higher is better.
        frame: What the network makes of a slice.
    """
    weights = score_weights(torch.tensor([list(scores)], dtype=torch.float32))
    c = coefficients(torch.from_numpy(np.ascontiguousarray(masks))[None], weights=weights)
    low = frame.framing.padded(c, frame.side, frame.low)[0, 0]
    return Rated(view=view, c=low, reference=reference_logits(reference, [view], frame)[0])


def rated_step(rated: Sequence[Rated], *, frame: Frame, batch: int, temperature: float) -> Step:
    """A step that moves answers towards what was preferred.

    Args:
        rated: At least one.
        frame: What the network makes of a slice.
        batch: Objects per step, fewer where fewer were prompted alike.
        temperature: Of the loss.

    Returns:
        A step for a `sam_infer.tuning.learner.SamLearner`.
    """
    alike: dict[tuple[int | bool, ...], list[int]] = {}
    for number, one in enumerate(rated):
        given = one.view.given
        assert given is not None
        kinds = (given.box is not None, given.text is not None, given.attention is not None)
        alike.setdefault((len(given.points), *kinds), []).append(number)
    groups = list(alike.values())
    shares = torch.tensor([len(group) for group in groups], dtype=torch.float64)

    def step(state: State) -> Tensor:
        group = groups[int(torch.multinomial(shares, 1, generator=state.generator))]
        order = torch.randperm(len(group), generator=state.generator)[:batch].tolist()
        some = [rated[group[n]] for n in order]
        views = [one.view for one in some]
        assert isinstance(state.network, SamLearner)
        asked = asked_of(views, frame, state.device)
        masks, iou = given_masks(state.network, views, asked, frame, narrow=state.precision == "bfloat16")
        reference, c = (
            torch.stack([getattr(one, name) for one in some]).to(state.device) for name in ("reference", "c")
        )
        moved = answered(masks, iou, frame, views[0].given)
        return preference_loss(moved, reference, c, temperature).loss

    return step
