"""Second looks in training: a crop comes back with the network's own logits, mostly with one more click."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sam_infer.networks.promptchannels import CropBatch
from sam_infer.prompts.simulated import next_click
from trainers.pretrain.sampler import MAX_POINTS, Drawn, stack

_NO_CLICK = 0.3  # of the crops come back as they were, for the network to improve its own answer


def corrected(batch: Drawn, logits: Tensor, count: int, rng: np.random.Generator) -> Drawn | None:
    """Some crops of a batch, each with the network's answer and mostly a click in its largest error.

    Args:
        batch: Crops and truths on the CPU.
        logits: (B, S, S), what the network answered.
        count: How many crops to give back.
        rng: Chooses the crops and, at times, a careless click.

    Returns:
        At most `count` crops; None where no crop of those drawn can take another click.
    """
    parts = []
    for index in rng.permutation(len(logits))[:count]:
        part = _one(batch, logits, int(index), rng)
        if part is not None:
            parts.append(part)
    return stack(parts) if parts else None


def _one(batch: Drawn, logits: Tensor, index: int, rng: np.random.Generator) -> Drawn | None:
    points = batch.crops.points[index : index + 1].clone()
    used = int((points[0, :, 2] >= 0).sum())
    truth, mask = batch.truth[index].numpy() > 0, logits[index].numpy() > 0
    click = next_click(truth, mask)
    if used >= MAX_POINTS or click is None:
        return None
    if rng.random() < 0.25:
        wrong = (truth & ~mask) if click[2] else (mask & ~truth)
        ys, xs = np.nonzero(wrong)
        pick = int(rng.integers(len(xs)))
        click = float(xs[pick]), float(ys[pick]), click[2]
    if rng.random() >= _NO_CLICK:
        points[0, used] = torch.tensor(click)
    box = batch.crops.box[index : index + 1]
    if used and rng.random() < 0.3:
        box = torch.full_like(box, torch.nan)
    crops = batch.crops.select(torch.tensor([index]))
    return Drawn(
        crops=CropBatch(
            image=crops.image, valid=crops.valid, box=box, points=points,
            previous=logits[index : index + 1].clamp(-12, 12),
        ),
        truth=batch.truth[index : index + 1],
        beyond=batch.beyond[index : index + 1],
    )  # fmt: skip
