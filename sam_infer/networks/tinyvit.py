"""TinyViT as MobileSAM's image encoder.

Wu et al., TinyViT: Fast Pretraining Distillation for Small Vision Transformers, arXiv:2207.10666, at 5 M
parameters; Zhang et al., Faster Segment Anything, arXiv:2306.14289, who keep stride 16 by not reducing before
the last stage and add SAM's neck. Parameters have MobileSAM's names: its checkpoints load here, and those
saved here load there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

SIDE = 1024
_WIDTHS = (64, 128, 160, 320)
_DEPTHS = (2, 2, 6, 2)
_HEADS = (2, 4, 5, 10)
_WINDOWS = (7, 7, 14, 7)
_EMBEDDING = 256


class TinyViT(nn.Module):
    """Encodes an image of 1024 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = SIDE
        self.patch_embed = _Stem(_WIDTHS[0])
        self.layers = nn.ModuleList(_Stage(index) for index in range(len(_WIDTHS)))
        # TinyViT's classifier: unused here, but part of every MobileSAM checkpoint.
        self.norm_head = nn.LayerNorm(_WIDTHS[-1])
        self.head = nn.Linear(_WIDTHS[-1], 1000)
        self.neck = nn.Sequential(
            nn.Conv2d(_WIDTHS[-1], _EMBEDDING, 1, bias=False), LayerNorm2d(_EMBEDDING),
            nn.Conv2d(_EMBEDDING, _EMBEDDING, 3, padding=1, bias=False), LayerNorm2d(_EMBEDDING),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Embed images.

        Args:
            x: (B, 3, 1024, 1024) float32, normalised and padded by ``Sam.preprocess``.

        Returns:
            (B, 256, 64, 64).
        """
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        out: Tensor = self.neck(x)
        return out


class _ConvNorm(nn.Sequential):
    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outer))


class _Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            _ConvNorm(3, width // 2, 3, 2), nn.GELU(), _ConvNorm(width // 2, width, 3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.seq(x)
        return out


class _Stage(nn.Module):
    """Blocks at one width, then the step to the next: convolutional ones first, windowed attention later."""

    def __init__(self, index: int) -> None:
        super().__init__()
        width = _WIDTHS[index]
        self.blocks = nn.ModuleList(
            _Attended(width, _HEADS[index], _WINDOWS[index]) if index else _Convolved(width)
            for _ in range(_DEPTHS[index])
        )
        if index + 1 < len(_WIDTHS):
            self.downsample = _Narrowed(
                width, _WIDTHS[index + 1], _WIDTHS[index + 1],
                stride=1 if index + 2 == len(_WIDTHS) else 2,
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class _Narrowed(nn.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1 convolutions with GELU between them."""

    def __init__(self, inner: int, middle: int, outer: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(inner, middle)
        self.conv2 = _ConvNorm(middle, middle, 3, stride, groups=middle)
        self.conv3 = _ConvNorm(middle, outer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return out


class _Convolved(_Narrowed):
    def __init__(self, width: int) -> None:
        super().__init__(width, 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + super().forward(x))


class _Attended(nn.Module):
    """Attention within windows, a depthwise convolution across them, and a perceptron."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, heads, window)
        self.local_conv = _ConvNorm(width, width, 3, groups=width)
        self.mlp = Perceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._in_windows(x)
        x = self.local_conv(x)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _in_windows(self, x: Tensor) -> Tensor:
        """Attention of (B, C, H, W) within windows of the grid, padded with zeros to whole windows."""
        batch, width, rows, columns = x.shape
        w = self.window
        x = F.pad(x, (0, -columns % w, 0, -rows % w))
        down, across = x.shape[2] // w, x.shape[3] // w
        windows = x.view(batch, width, down, w, across, w).permute(0, 2, 4, 3, 5, 1)
        windows = self.attn(windows.reshape(-1, w * w, width))
        windows = windows.view(batch, down, across, w, w, width).permute(0, 5, 1, 3, 2, 4)
        return windows.reshape(batch, width, down * w, across * w)[..., :rows, :columns]


class Attention(nn.Module):
    """Attention among the N = window x window tokens of a window, with a bias a head and distance."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        axis = torch.arange(window)
        distance = (axis[:, None] - axis[None]).abs()
        index = distance[:, None, :, None] * window + distance[None, :, None, :]
        self.register_buffer("_index", index.reshape(window**2, window**2), persistent=False)
        self._index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(windows, N, C) tokens to the same shape."""
        windows, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).view(windows, tokens, self.heads, -1).transpose(1, 2)
        query, key, value = parts.chunk(3, dim=-1)
        bias = self.attention_biases[:, self._index]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(windows, tokens, width))
        return out


class Perceptron(nn.Module):
    """A perceptron of one hidden layer that normalises its tokens itself.

    Args:
        width: Channels of the tokens, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) tokens to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out
