"""The bundled promptable network: a small U-Net over a crop whose prompts are drawn as channels."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_infer.networks.promptchannels import CHANNELS

WIDTHS = (24, 40, 72, 96)
DEPTHS = (1, 2, 2, 2)


class PromptNet(nn.Module):
    """Crop and prompt channels in, mask logits and a predicted IoU out.

    Pixel-unshuffle stem, residual 3x3 blocks with group norm, attention at the coarsest level, additive
    skips, pixel-shuffle head.

    Args:
        widths: Channels at 1/2, 1/4, 1/8 and 1/16 of the crop's resolution; multiples of 8.
        depths: Residual blocks at each of these, on the way down and on the way up.
        channels: Number of input channels.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, ...] = WIDTHS,
        depths: tuple[int, ...] = DEPTHS,
        channels: int = len(CHANNELS),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels * 4, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(_Level(w, d) for w, d in zip(widths, depths, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.attention = _Attention(widths[-1])
        self.middle = _Block(widths[-1])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(_Level(w, d) for w, d in zip(widths[:-1], depths[:-1], strict=True))
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

    @classmethod
    def holding(cls, weights: dict[str, Tensor]) -> PromptNet:
        """A network of the widths and depths of a state, with that state."""
        blocks = [re.match(r"encoder\.(\d+)\.(?:more\.\d+\.)?norm1\.weight$", name) for name in weights]
        depth = Counter(int(found[1]) for found in blocks if found)
        widths = tuple(len(weights[f"encoder.{level}.norm1.weight"]) for level in sorted(depth))
        depths = tuple(depth[level] for level in sorted(depth))
        network = cls(widths=widths, depths=depths, channels=weights["stem.weight"].shape[1] // 4)
        network.load_state_dict(weights)
        return network

    def grow_from(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a shallower network of the same widths; the answers stay as they were.

        A block ends in a convolution of zeros, so one that is new passes its input on unchanged.

        Args:
            weights: State of a `PromptNet` with at most as many blocks a level.

        Raises:
            ValueError: When something else than blocks differs.
        """
        mine = self.state_dict()
        odd = sorted(n for n, v in weights.items() if n not in mine or mine[n].shape != v.shape)
        odd += sorted(n for n in mine if n not in weights and ".more." not in n)
        if odd:
            raise ValueError(f"weights must differ in the number of blocks alone, but {odd[0]} differs")
        self.load_state_dict(weights, strict=False)

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
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(y)))
        return out


class _Level(_Block):
    """`depth` blocks in a row; the first one's weights are named as if it were alone."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width)
        self.more = nn.ModuleList(_Block(width) for _ in range(depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for block in self.more:
            x = block(x)
        return x


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
