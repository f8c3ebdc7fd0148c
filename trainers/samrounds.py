"""What a step of a Segment Anything learns from: prompts, the masks they give, corrective clicks, the loss.

S is the side of the network's masks, a quarter of its embedding's pixel; coordinates are pixels of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor

from sam_infer.tuning.extras import ExtraPrompts

_CLAMP = 20.0
#: (N, S, S) logits and shares -> (N,), the loss of each mask.
Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompts of P objects.

    Args:
        owner: (P,) int64, the image of each in its batch.
        truth: (P, S, S) float32, share of each pixel that the object covers.
        box: (P, 4) float32 xyxy; NaN where there is none.
        clicks: (P, N, 3) float32: x, y and 1 = foreground, 0 = background.
        first: (P, 2) float32, an earlier foreground click; NaN where there is none.
        previous: (P, S, S) float32 logits; all 0 where there is none.
        text: (P, D) float32 embedded texts; None = nothing is said.
        attention: (P, 1, h, w) float32 on the grid of the embedding; None = there is none.
    """

    owner: Tensor
    truth: Tensor
    box: Tensor
    clicks: Tensor
    first: Tensor
    previous: Tensor
    text: Tensor | None = None
    attention: Tensor | None = None

    def select(self, index: Tensor) -> Asked:
        """Some of the objects."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Asked(**{name: value[index] for name, value in given.items()})


def embed(model: Sam, asked: Asked) -> tuple[Tensor, Tensor]:
    """Sparse (P, T, C) and dense (P, C, h, w) embeddings from segment-anything's prompt encoder.

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


def decode(
    model: Sam, features: Tensor, asked: Asked, extras: ExtraPrompts | None = None
) -> tuple[Tensor, Tensor]:
    """All four masks (P, 4, S, S) and predicted IoU (P, 4), float32.

    The mask decoder takes one image; it adds the dense embedding to it. Here every prompt's image is already
    in its dense embedding and the image is 0, so that prompts of several images are decoded at once.

    Args:
        model: The network.
        features: (B, C, h, w), the embeddings of the images.
        asked: The prompts.
        extras: Takes text and attention; None where there are none.
    """
    sparse, dense = embed(model, asked)
    if extras is not None:
        sparse, dense = extras(sparse, dense, text=asked.text, attention=asked.attention)
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


def bce_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """2 BCE + Dice of each mask, (N, S, S) logits and shares -> (N,): what the shipped model learned with."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    return 2 * entropy + soft_dice_loss(logits, truth)


def focal_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """20 focal + Dice of each mask, (N, S, S) logits and shares -> (N,).

    As SAM was trained, with SAM-Med2D's numbers (code of Cheng et al., arXiv:2308.16184): gamma 2, alpha
    0.25 on the object and 0.75 on the background, a mean over all pixels. Its Dice is that of a whole batch;
    here it is one of each mask, so that small objects count as large ones do.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    share = torch.sigmoid(logits)
    right = share * truth + (1 - share) * (1 - truth)
    alpha = 0.25 * truth + 0.75 * (1 - truth)
    return 20 * (alpha * (1 - right).square() * entropy).mean((1, 2)) + soft_dice_loss(logits, truth)


def soft_dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice of probabilities, smoothed by 1; (N, S, S) -> (N,)."""
    share = torch.sigmoid(logits)
    both, total = (share * truth).sum((1, 2)), share.sum((1, 2)) + truth.sum((1, 2))
    return 1 - (2 * both + 1) / (total + 1)


def losses(
    masks: Tensor,
    iou: Tensor,
    asked: Asked,
    *,
    masks_of: Literal["by_prompt", "three", "one"] = "by_prompt",
    criterion: Criterion = bce_dice,
) -> tuple[Tensor, Tensor]:
    """The loss of every object, and the logits of the mask that the model would answer with.

    The criterion of the single mask, or of the best of three masks where those answer (the others count a
    twentieth), and the squared error of the predicted IoU of the masks in use.

    Args:
        masks: (P, 4, S, S) logits.
        iou: (P, 4), predicted.
        asked: The prompts and truths.
        masks_of: Which masks answer: those of `sam_infer.engines.framing.Framing.masks`.
        criterion: Of masks.

    Returns:
        (P,) losses and (P, S, S) detached logits.
    """
    lone = ambiguous(asked)
    several = lone if masks_of == "by_prompt" else torch.full_like(lone, masks_of == "three")
    used = torch.stack([~several, several, several, several], 1)
    row, _ = torch.nonzero(used, as_tuple=True)
    logits, quality, truth = masks[used], iou[used], asked.truth[row]
    with torch.no_grad():
        found, real = logits > 0, truth > 0.5
        reached = (found & real).sum((1, 2)) / (found | real).sum((1, 2)).clamp_min(1)
    wrong = masks.new_zeros(used.shape).masked_scatter(used, criterion(logits, truth))
    off = masks.new_zeros(used.shape).masked_scatter(used, (quality - reached).square())
    single = wrong[:, 0] + off[:, 0]
    three = wrong[:, 1:].amin(1) + 0.05 * wrong[:, 1:].mean(1) + off[:, 1:].mean(1)
    best = torch.where(several, 1 + iou[:, 1:].argmax(1), 0)
    chosen = masks.detach()[torch.arange(len(masks)), best]
    return torch.where(several, three, single), chosen


def corrected(asked: Asked, logits: Tensor, rng: np.random.Generator, *, side: int) -> Asked:
    """The same objects with one more click in an error and the previous logits, as SAM's training does.

    The click is the middle of a large error at times, any wrong pixel at others. A seventh of the rounds
    leave the previous mask out.

    Args:
        asked: The prompts so far.
        logits: (P, S, S), the answer to them.
        rng: Source of every choice.
        side: Of the network's input in pixels.
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
    scale = side / logits.shape[-1]
    click = torch.stack([scale * (column + 0.5) - 0.5, scale * (row + 0.5) - 0.5, label], 1)
    drop = rng.random() < 1 / 7
    return replace(
        asked,
        clicks=torch.cat([asked.clicks, click[:, None]], 1),
        previous=torch.zeros_like(logits) if drop else logits.clamp(-_CLAMP, _CLAMP),
    )
