"""The loss of learning from rated candidates: preference alignment without rewards, in closed form.

Konwer et al. (2025, arXiv 2503.04639) train a mask decoder so that, against a frozen reference, it makes good
candidates likelier and bad ones less likely. With Y1 (best) to Y4 (worst) and the weights b1 = 1, b2 = 0.5,

    L = -log sigmoid(b1 r(Y1) + b2 r(Y2) - b2 r(Y3) - b1 r(Y4)),   r(Y) = log p(Y) - log p_reference(Y).

With pixels that are independent (the natural reading; how p(Y) reduces over pixels is not known), log p(Y) is
linear in Y, the weights sum to nought, and what all candidates agree on cancels exactly:

    margin m = sum over pixels of c (z - z_reference),   c = b1 (Y1 - Y4) + b2 (Y2 - Y3),   L = softplus(-m)

in logits z. No likelihood is needed. A sum saturates at once and a mean over all pixels leaves nothing to
learn, so the margin is a mean over the pixels with c != 0, times a temperature (own choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Weights of the outermost pair of candidates and of the innermost, as published.
BETAS = (1.0, 0.5)
#: Of the margin.
TEMPERATURE = 10.0
#: What sums of weights that cancel may leave in single precision.
_NOUGHT = 1e-5


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """The loss of a batch, and what it was made of.

    Args:
        loss: Scalar tensor; 0, with a gradient of 0, where no item prefers anything.
        band: Fraction of the pixels of the batch that any candidate is preferred on.
        margin: Mean |margin| of the items that prefer something; 0 where none does.
        items: How many items prefer something.
    """

    loss: Tensor
    band: float
    margin: float
    items: int


def rank_weights(count: int, betas: Sequence[float] = BETAS) -> Tensor:
    """The weights of candidates from best to worst.

    Four candidates have the published (b1, b2, -b2, -b1). For other numbers, as an own choice, the k-th best
    and the k-th worst are a pair with opposite weights, the outermost b1, the innermost b2, those between
    evenly spaced; one in the middle has 0, and of two or three candidates the one pair has b1.

    Args:
        count: N, at least 2.
        betas: (b1, b2).

    Returns:
        (N,) float32 that sums to 0.
    """
    pairs = count // 2
    upper = torch.linspace(betas[0], betas[1], pairs) if pairs > 1 else torch.tensor([betas[0]])
    return torch.cat([upper, torch.zeros(count % 2), -upper.flip(0)]).float()


def score_weights(scores: Tensor, betas: Sequence[float] = BETAS) -> Tensor:
    """The weights of candidates in their own order, from what they were rated with.

    No preference is expressed between tied candidates: each has the mean of the weights of their ranks. How
    ties are treated is not published; this is the project's own choice. Where all are tied all weights are 0.

    Args:
        scores: (B, N), higher is better, integers such as ratings.
        betas: As in `rank_weights`.

    Returns:
        (B, N) float32, each row summing to 0.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = rank_weights(scores.shape[1], betas).to(scores.device).expand(scores.shape)
    own = torch.zeros_like(ranked).scatter(1, order, ranked)
    tied = (scores[:, :, None] == scores[:, None, :]).float()
    return (tied @ own[:, :, None])[:, :, 0] / tied.sum(2)


def coefficients(masks: Tensor, *, weights: Tensor | None = None, betas: Sequence[float] = BETAS) -> Tensor:
    """How much each pixel is to become foreground (> 0) or background (< 0).

    Args:
        masks: (B, N, H, W) bool or 0 and 1, candidates from best to worst; in any order with ``weights``.
        weights: (B, N) from `score_weights`; None = `rank_weights`.
        betas: For `rank_weights`.

    Returns:
        c (B, H, W) float32, exactly 0 wherever the candidates agree.
    """
    count = masks.shape[1]
    if weights is None:
        weights = rank_weights(count, betas).to(masks.device).expand(len(masks), count)
    c = torch.einsum("bn,bnhw->bhw", weights, masks.float())
    return torch.where(c.abs() > _NOUGHT, c, torch.zeros_like(c))


def preference_loss(
    logits: Tensor, reference_logits: Tensor, c: Tensor, temperature: float = TEMPERATURE
) -> PreferenceLoss:
    """softplus(-margin), the mean over the items whose ``c`` is not 0 everywhere.

    Args:
        logits: (B, H, W) float32, of the model that learns.
        reference_logits: (B, H, W) float32, of the frozen reference.
        c: (B, H, W) float32, from `coefficients`.
        temperature: Of the margin, which is a mean over the pixels with c != 0.
    """
    preferred = c != 0
    pixels = preferred.sum((1, 2))
    some = pixels > 0
    moved = (c * (logits - reference_logits.detach())).sum((1, 2))
    margins = temperature * moved[some] / pixels[some]
    loss = F.softplus(-margins).mean() if len(margins) else moved.sum() * 0
    return PreferenceLoss(
        loss=loss,
        band=float(preferred.float().mean()),
        margin=float(margins.detach().abs().mean()) if len(margins) else 0.0,
        items=len(margins),
    )


def best_candidate_loss(logits: Tensor, best: Tensor) -> Tensor:
    """Binary cross entropy to the best candidate: the control that learns from it alone.

    The publication compares with such a control; that its loss is this one is this project's own choice.

    Args:
        logits: (B, H, W) float32.
        best: (B, H, W) bool or 0 and 1.
    """
    return F.binary_cross_entropy_with_logits(logits, best.float())
