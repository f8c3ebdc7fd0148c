"""What a step of ``sam_tiny`` learns from: prompts, the masks they give, corrective clicks, the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor

from trainers.pretrain.samtinyscenes import Scenes

_CLAMP = 20.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompts of P objects.

    Args:
        owner: (P,) int64, the image of each in its batch.
        truth: (P, 128, 128) float32, share of each pixel that the object covers.
        box: (P, 4) float32; NaN where there is none.
        clicks: (P, N, 3) float32: x, y in pixels of the 256 px image and 1 = foreground, 0 = background.
        first: (P, 2) float32, an earlier foreground click; NaN where there is none.
        previous: (P, 128, 128) float32 logits; all 0 where there is none.
    """

    owner: Tensor
    truth: Tensor
    box: Tensor
    clicks: Tensor
    first: Tensor
    previous: Tensor

    def select(self, index: Tensor) -> Asked:
        """Some of the objects."""
        return Asked(**{name: value[index] for name, value in vars(self).items()})


def first_asked(scenes: Scenes) -> Asked:
    """The prompts of a batch, image by image, before any correction."""
    images, count = scenes.truth.shape[:2]
    truth = scenes.truth.flatten(0, 1)
    return Asked(
        owner=torch.arange(images, device=truth.device).repeat_interleave(count),
        truth=truth, box=scenes.box.flatten(0, 1), clicks=truth.new_zeros(len(truth), 0, 3),
        first=scenes.click.flatten(0, 1), previous=scenes.previous.flatten(0, 1),
    )  # fmt: skip


def embed(model: Sam, asked: Asked) -> tuple[Tensor, Tensor]:
    """Sparse (P, T, C) and dense (P, C, 32, 32) embeddings from segment-anything's prompt encoder.

    A box gives two tokens; clicks without a box give theirs and one that says "no point", so that a box
    with N corrective clicks and a first click with N corrective clicks give equally many.
    """
    boxed = torch.isfinite(asked.box[:, 0])
    masked = asked.previous.flatten(1).any(1)
    kinds = boxed.long() * 2 + masked.long()
    order, parts = [], []
    for kind in torch.unique(kinds).tolist():
        index = torch.nonzero(kinds == kind)[:, 0]
        part = asked.select(index)
        points = part.clicks
        if kind < 2 and torch.isfinite(part.first).all():
            first = torch.cat([part.first, torch.ones_like(part.first[:, :1])], 1)
            points = torch.cat([first[:, None], points], 1)
        parts.append(
            model.prompt_encoder(
                points=(points[..., :2], points[..., 2].long()) if points.shape[1] else None,
                boxes=part.box if kind >= 2 else None,
                masks=part.previous[:, None] if kind % 2 else None,
            )
        )
        order.append(index)
    back = torch.argsort(torch.cat(order))
    sparse, dense = (torch.cat([part[n] for part in parts])[back] for n in (0, 1))
    return sparse, dense


def decode(model: Sam, features: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """All four masks (P, 4, 128, 128) and predicted IoU (P, 4), float32.

    The mask decoder takes one image; it adds the dense embedding to it. Here every prompt's image is already
    in its dense embedding and the image is 0, so that prompts of several images are decoded at once.

    Args:
        model: The network.
        features: (B, C, 32, 32), the embeddings of the images.
        asked: The prompts.
    """
    sparse, dense = embed(model, asked)
    dense = features[asked.owner] + dense.to(features.dtype)
    masks, iou = model.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(features[:1]),
        image_pe=model.prompt_encoder.get_dense_pe().to(features.dtype),
        sparse_prompt_embeddings=sparse.to(features.dtype), dense_prompt_embeddings=dense,
    )  # fmt: skip
    return masks.float(), iou.float()


def ambiguous(asked: Asked) -> Tensor:
    """(P,) bool: one click is the whole prompt, so that three masks answer it."""
    alone = torch.isfinite(asked.first[:, 0]) & ~asked.previous.flatten(1).any(1)
    return alone if asked.clicks.shape[1] == 0 else torch.zeros_like(alone)


def losses(masks: Tensor, iou: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """The loss of every object, and the logits of the mask that the model would answer with.

    2 BCE + Dice of the single mask, or of the best of three masks where one click is the whole prompt (the
    others count a twentieth), and the squared error of the predicted IoU of the masks in use.

    Args:
        masks: (P, 4, S, S) logits.
        iou: (P, 4), predicted.
        asked: The prompts and truths.

    Returns:
        (P,) losses and (P, S, S) detached logits.
    """
    several = ambiguous(asked)
    used = torch.stack([~several, several, several, several], 1)
    row, _ = torch.nonzero(used, as_tuple=True)
    logits, quality, truth = masks[used], iou[used], asked.truth[row]
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    share = torch.sigmoid(logits)
    both, total = (share * truth).sum((1, 2)), share.sum((1, 2)) + truth.sum((1, 2))
    with torch.no_grad():
        found, real = logits > 0, truth > 0.5
        reached = (found & real).sum((1, 2)) / (found | real).sum((1, 2)).clamp_min(1)
    wrong = masks.new_zeros(used.shape).masked_scatter(used, 2 * entropy + 1 - (2 * both + 1) / (total + 1))
    off = masks.new_zeros(used.shape).masked_scatter(used, (quality - reached).square())
    single = wrong[:, 0] + off[:, 0]
    three = wrong[:, 1:].amin(1) + 0.05 * wrong[:, 1:].mean(1) + off[:, 1:].mean(1)
    best = torch.where(several, 1 + iou[:, 1:].argmax(1), 0)
    chosen = masks.detach()[torch.arange(len(masks)), best]
    return torch.where(several, three, single), chosen


def corrected(asked: Asked, logits: Tensor, rng: np.random.Generator) -> Asked:
    """The same objects with one more click in an error and the previous logits, as SAM's training does.

    The click is the middle of a large error at times, any wrong pixel at others. A seventh of the rounds
    leave the previous mask out.

    Args:
        asked: The prompts so far.
        logits: (P, S, S), the answer to them.
        rng: Source of every choice.
    """
    truth, mask = asked.truth > 0.5, logits > 0
    wrong = (truth ^ mask).float()
    bare = wrong.flatten(1).sum(1) == 0
    wrong = torch.where(bare[:, None, None], truth.float(), wrong)  # nothing to correct: confirm
    random = torch.from_numpy(rng.random(wrong.shape, dtype=np.float32)).to(wrong.device)
    if rng.random() < 0.6:
        depth, inner = torch.zeros_like(wrong), wrong
        for _ in range(6):  # how many erosions a pixel survives
            depth = depth + inner
            inner = 1 - F.max_pool2d(1 - inner[:, None], 3, 1, 1)[:, 0]
        spread = F.avg_pool2d(wrong[:, None], 15, 1, 7)[:, 0]
        random = 0.05 * random + depth + 6 * spread
    place = torch.where(wrong > 0, random, -torch.ones_like(random)).flatten(1).argmax(1)
    row, column = place // logits.shape[-1], place % logits.shape[-1]
    label = truth.flatten(1).gather(1, place[:, None])[:, 0].float()
    click = torch.stack([2 * column + 0.5, 2 * row + 0.5, label], 1)
    drop = rng.random() < 1 / 7
    return replace(
        asked,
        clicks=torch.cat([asked.clicks, click[:, None]], 1),
        previous=torch.zeros_like(logits) if drop else logits.clamp(-_CLAMP, _CLAMP),
    )
