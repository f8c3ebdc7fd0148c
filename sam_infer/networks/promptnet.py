"""The bundled promptable network: a small U-Net over a crop whose prompts are drawn as channels."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_infer.networks.promptchannels import CHANNELS

WIDTHS = (24, 40, 72, 96)


class PromptNet(nn.Module):
    """Crop and prompt channels in, mask logits and a predicted IoU out.

    Pixel-unshuffle stem, residual 3x3 blocks with group norm, attention at the coarsest level, additive
    skips, pixel-shuffle head.

    Args:
        widths: Channels at 1/2, 1/4, 1/8 and 1/16 of the crop's resolution; multiples of 8.
        channels: Number of input channels.
    """

    def __init__(self, *, widths: tuple[int, ...] = WIDTHS, channels: int = len(CHANNELS)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels * 4, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(_Block(w) for w in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.attention = _Attention(widths[-1])
        self.middle = _Block(widths[-1])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(_Block(w) for w in widths[:-1])
        self.head = nn.Sequential(
            nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 4, 3, padding=1)
        )
        self.iou = nn.Sequential(nn.Linear(widths[-1] + 2 * widths[0] + 1, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Segment.

        Args:
            inputs: (B, C, S, S) float32 from `prompt_channels`; S a multiple of 16.

        Returns:
            logits: (B, S, S) float32, > 0 is foreground.
            iou: (B,) float32 in 0..1, the predicted intersection over union with the wanted object.
        """
        x = self.stem(F.pixel_unshuffle(inputs, 2))
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            if level < len(self.down):
                skips.append(x)
                x = self.down[level](x)
        x = self.middle(self.attention(x))
        bottom = x.mean((2, 3))
        for level in reversed(range(len(self.down))):
            x = F.interpolate(self.up[level](x), scale_factor=2.0, mode="nearest") + skips[level]
            x = self.decoder[level](x)
        logits = F.pixel_shuffle(self.head(x), 2)[:, 0].float()
        return logits, self._quality(bottom, x, logits)

    def _quality(self, bottom: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        mask = F.avg_pool2d(torch.sigmoid(logits.detach())[:, None], 2)
        size = mask.sum((2, 3))
        inside = (features * mask).sum((2, 3)) / (size + 1.0)
        outside = features.mean((2, 3))
        certainty = (logits.detach().abs() * 0.25).clamp(max=1.0).mean((1, 2))[:, None]
        pooled = torch.cat([bottom, inside, outside, certainty], 1).float()
        return torch.sigmoid(self.iou(pooled)[:, 0])


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(y)))
        return out


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        q, k, v = (
            t.reshape(batch, self.heads, width // self.heads, height * breadth).transpose(2, 3)
            for t in self.qkv(self.norm(x)).chunk(3, 1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(y.transpose(2, 3).reshape(batch, width, height, breadth))
        return out
