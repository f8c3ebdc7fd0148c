"""SAM's attention in one fused call, with its relative positions as extra channels of queries and keys."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """``segment_anything``'s ``Attention`` without the matrix of scores.

    SAM adds to the score of query (h, w) and key (h', w') the decomposed relative position
    q.Rh[h, h'] + q.Rw[h, w'] (Li et al., MViTv2, arXiv:2112.01526, eq. 4). That is a dot product too: with
    q' = [scale q, q.Rh[h], q.Rw[w]] and k' = [k, onehot(h'), onehot(w')], q'.k' is the whole score, and
    ``softmax(q' k'T) v`` is what `torch.nn.functional.scaled_dot_product_attention` fuses. The result is the
    same but for the order of sums. Values are zero-padded to the channels of the queries: the fused kernels
    want equal ones.

    Args:
        attention: The module whose parameters this one takes over, under the same names.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = attention.scale
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.use_rel_pos: bool = attention.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h = attention.rel_pos_h
            self.rel_pos_w = attention.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, H, W, C) tokens.

        Returns:
            (B, H, W, C) tokens.
        """
        batch, height, width, channels = x.shape
        parts = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        depth = value.shape[-1]
        if self.use_rel_pos:
            query, key = self._with_positions(query, key, height, width)
            value = F.pad(value, (0, height + width))
        else:
            query = query * self.scale
        out = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :depth]
        out = self.proj(out.transpose(1, 2).reshape(batch, height, width, channels))
        return out

    def _with_positions(self, query: Tensor, key: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(B, heads, H * W, D) queries and keys with H + W channels more."""
        from segment_anything.modeling.image_encoder import get_rel_pos

        batch, heads, tokens, depth = query.shape
        grid = query.reshape(batch, heads, height, width, depth)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, get_rel_pos(width, width, self.rel_pos_w))
        query = torch.cat([query * self.scale, rows.flatten(2, 3), columns.flatten(2, 3)], dim=-1)
        row = torch.eye(height, dtype=query.dtype, device=key.device).repeat_interleave(width, dim=0)
        column = torch.eye(width, dtype=query.dtype, device=key.device).repeat(height, 1)
        place = torch.cat([row, column], dim=1).expand(batch, heads, tokens, height + width)
        return query, torch.cat([key.to(query.dtype), place], dim=-1)


def share(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder's modules that holds the same parameters and buffers, not copies of them."""
    tensors = {id(t): t for t in (*encoder.parameters(), *encoder.buffers())}
    return copy.deepcopy(encoder, tensors)


def fuse(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder, on the same parameters, in which every attention of SAM's is fused.

    Attention of other classes, and subclasses of SAM's, which may compute something else, stay as they are.
    """
    from segment_anything.modeling.image_encoder import Attention

    fused = share(encoder)
    for parent in list(fused.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Attention:
                setattr(parent, name, FusedAttention(child))
    return fused
