"""SAM-Med2D's image encoder: SAM's ViT at 256 pixels with an adapter in every block.

Cheng et al., SAM-Med2D, arXiv:2308.16184, figure 3. An adapter weighs the channels by their means (squeeze
and excitation), then lets neighbours exchange what they hold at half the resolution; its result joins that of
the block's perceptron. Parameters have the names of the authors' checkpoints.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block, window_partition, window_unpartition
from torch import Tensor, nn

SIDE = 256
_PATCH = 16
_WIDTH, _DEPTH, _HEADS, _WINDOW = 768, 12, 12, 14
_GLOBAL = (2, 5, 8, 11)
_REDUCTION = 4


class AdaptedEncoder(ImageEncoderViT):
    """ViT-B with an adapter in every block; (B, 3, 256, 256) float32 to (B, 256, 16, 16)."""

    def __init__(self) -> None:
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(img_size=SIDE, patch_size=_PATCH, embed_dim=_WIDTH, depth=0, norm_layer=norm)
        self.blocks = nn.ModuleList(
            _AdaptedBlock(
                _WIDTH, _HEADS, norm_layer=norm, use_rel_pos=True, input_size=(SIDE // _PATCH,) * 2,
                window_size=0 if index in _GLOBAL else _WINDOW,
            )
            for index in range(_DEPTH)
        )  # fmt: skip


class _AdaptedBlock(Block):
    def __init__(self, width: int, heads: int, **arguments: Any) -> None:
        super().__init__(width, heads, **arguments)
        self.Adapter = Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        rest, x = x, self.norm1(x)
        size = x.shape[1:3]
        if self.window_size:
            x, padded = window_partition(x, self.window_size)
        x = self.attn(x)
        if self.window_size:
            x = window_unpartition(x, self.window_size, padded, size)
        x = rest + x
        normed = self.norm2(x)
        out: Tensor = x + self.mlp(normed) + self.Adapter(normed)
        return out


class Adapter(nn.Module):
    """What SAM-Med2D puts beside the perceptron of each block.

    Args:
        width: Channels of the tokens, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, width // _REDUCTION, bias=False), nn.ReLU(),
            nn.Linear(width // _REDUCTION, width, bias=False), nn.Sigmoid(),
        )  # fmt: skip
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) tokens to the same shape; H and W even."""
        x = x.permute(0, 3, 1, 2)
        weighed = x * self.channel(x.mean((2, 3)))[..., None, None]
        out: Tensor = self.norm((x + self.spatial(weighed)).permute(0, 2, 3, 1))
        return out
