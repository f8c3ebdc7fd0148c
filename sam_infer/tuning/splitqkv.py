"""Queries, keys and values as three projections where a network packs them in one.

Segment Anything's encoders compute all three in one linear map, ``qkv``. Low-rank adaptation of queries and
values, as Zhang and Liu do it (SAMed, arXiv:2304.13785), leaves the keys alone and so needs them by name.
"""

from __future__ import annotations

import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from sam_infer.engines.attention import FusedAttention
from sam_infer.networks.tinyvit import Attention as TinyAttention


class SplitQkv(nn.Module):
    """One packed projection as ``q``, ``k`` and ``v``, with the same answer.

    Its output is that of the packed projection: the channels come in groups, each of which holds its queries,
    then its keys, then its values.

    Args:
        packed: The projection, C to 3 * C channels; what it holds is copied.
        groups: How many groups its output has: 1 in segment-anything, one a head in TinyViT.
    """

    def __init__(self, packed: nn.Linear, groups: int) -> None:
        super().__init__()
        self.groups = groups
        weights = _parts(packed.weight, groups)
        biases = (None,) * 3 if packed.bias is None else _parts(packed.bias, groups)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) tokens to (..., 3 * C) in the order of the packed projection."""
        return self._packed([one(x) for one in (self.q, self.k, self.v)], dim=-1)

    def joined(self) -> nn.Linear:
        """The packed projection with the parameters as they are now."""
        parts = (self.q, self.k, self.v)
        weight = self._packed([one.weight for one in parts], dim=0)
        bias = None if self.q.bias is None else self._packed([one.bias for one in parts], dim=0)
        return _linear(weight, bias)

    def _packed(self, parts: list[Tensor], dim: int) -> Tensor:
        """Three arrays of C channels along an axis as one of 3 * C."""
        grouped = [part.unflatten(dim, (self.groups, -1)) for part in parts]
        if dim < 0:
            return torch.stack(grouped, dim=dim - 1).flatten(dim - 2)
        return torch.stack(grouped, dim=dim + 1).flatten(dim, dim + 2)


def split(encoder: nn.Module) -> list[SplitQkv]:
    """Split the packed projection of every attention of an encoder, in place.

    Args:
        encoder: A Segment Anything's image encoder, as segment-anything or MobileSAM builds it.

    Returns:
        The projections, in the order of the encoder; empty where it packs none.

    Raises:
        ValueError: When attention of another class packs them: in which order it does is not known.
    """
    made = []
    for attention in encoder.modules():
        packed = getattr(attention, "qkv", None)
        if isinstance(packed, nn.Linear):
            attention.qkv = SplitQkv(packed, _groups(attention))
            made.append(attention.qkv)
    return made


def join(network: nn.Module) -> None:
    """Undo `split`, in place and with what the projections hold now."""
    for attention in network.modules():
        if isinstance(getattr(attention, "qkv", None), SplitQkv):
            attention.qkv = attention.qkv.joined()  # type: ignore[union-attr, operator]


def _groups(attention: nn.Module) -> int:
    if isinstance(attention, Attention | FusedAttention):
        return 1
    if isinstance(attention, TinyAttention):
        return attention.heads
    raise ValueError(f"how {type(attention).__name__} packs queries, keys and values is not known")


def _parts(packed: Tensor, groups: int) -> tuple[Tensor, ...]:
    """(3 * C, ...) rows in groups to three of (C, ...)."""
    grouped = packed.unflatten(0, (groups, 3, -1))
    return tuple(part.flatten(0, 1) for part in grouped.unbind(1))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A projection with a copy of (outputs, inputs) weights and (outputs,) biases."""
    made = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made
