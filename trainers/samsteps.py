"""What one optimiser step of tuning a SAM does: prompts as clinicians give them, corrections, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sam_infer.prompts.simulated import jitter_box
from sam_infer.tuning.learner import SamLearner
from sam_infer.types import Box
from trainers.loop import State, Step
from trainers.samrounds import Asked, Criterion, bce_dice, corrected, decode, losses
from trainers.samviews import CARELESS, Frame, View, features_of, view_weights

#: Corrective clicks of a step, drawn with equal chances; own choice.
CORRECTIONS = (0, 1, 1, 2, 4)


def tuning_step(views: Sequence[View], *, frame: Frame, batch: int, criterion: Criterion = bce_dice) -> Step:
    """A step of tuning on what was accepted: each object by a box and by a click, then corrective clicks.

    Half of the prompts, at random, are corrected: the first answer is what most needs to be learned, and each
    correction costs as much. Boxes are drawn carelessly, every side off by up to a tenth of the box; the
    first click is anywhere deep in the object or anywhere at all in it; corrective clicks are those of
    `trainers.samrounds.corrected`. All numbers are this project's own choice.

    Args:
        views: What is learned from.
        frame: What the network makes of a slice.
        batch: Views per step, two prompts each.
        criterion: Of masks.

    Returns:
        A step for a `sam_infer.tuning.learner.SamLearner`.
    """
    weights = view_weights(views)

    def step(state: State) -> Tensor:
        learner = state.network
        assert isinstance(learner, SamLearner)
        drawn = torch.multinomial(weights, batch, replacement=True, generator=state.generator).tolist()
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=state.generator)))
        chosen = [views[n] for n in drawn]
        narrow = torch.autocast(state.device.type, torch.bfloat16, enabled=state.precision == "bfloat16")
        with narrow:
            features = features_of(chosen, learner.sam, frame, state.device)
        asked, found = clinical(chosen, frame, rng, state.device), []
        rounds = 1 + int(rng.choice(CORRECTIONS))
        for round_ in range(rounds):
            with narrow:
                masks, iou = decode(learner.sam, features, asked, learner.extras)
            wrong, logits = losses(masks, iou, asked, masks_of=frame.framing.masks, criterion=criterion)
            found.append(wrong.mean())
            if round_ == 0:
                half = torch.from_numpy(rng.permutation(len(logits))[: len(chosen)]).to(logits.device)
                asked, logits = asked.select(half), logits[half]
            if round_ < rounds - 1:
                asked = corrected(asked, logits, rng, side=frame.side)
        return torch.stack(found).mean()

    return step


def clinical(views: Sequence[View], frame: Frame, rng: np.random.Generator, device: torch.device) -> Asked:
    """The first prompts of views: a box of each, then a click of each; (2 B) prompts of B images."""
    count, side = len(views), frame.side
    truth = torch.from_numpy(np.stack([view.truth for view in views])).to(device).float() / 255.0
    boxes = [
        frame.framing.boxes(
            np.array([jitter_box(_box(v), CARELESS * rng.random(), rng, v.size)]), v.size, side
        )[0]
        for v in views
    ]
    nothing = torch.full((count, 4), float("nan"), device=device)
    blank = torch.zeros_like(truth)
    clicks = torch.zeros(count, 0, 3, device=device)
    alone = Asked(
        owner=torch.arange(count, device=device), truth=truth, box=nothing, clicks=clicks,
        first=nothing[:, :2], previous=blank,
    )  # fmt: skip
    first = corrected(alone, torch.full_like(truth, -1.0), rng, side=side).clicks[:, 0, :2]
    boxed = replace(alone, box=torch.from_numpy(np.stack(boxes)).to(device).float())
    return joined(boxed, replace(alone, first=first))


def joined(*several: Asked) -> Asked:
    """Prompts one after another, about the same images."""
    names = [name for name, value in vars(several[0]).items() if value is not None]
    return Asked(**{name: torch.cat([getattr(one, name) for one in several]) for name in names})


def _box(view: View) -> Box:
    if view.box is None:
        raise ValueError(f"nothing of {view.label} is to be seen on this view of {view.case}")
    return view.box
