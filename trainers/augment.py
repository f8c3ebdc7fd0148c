"""Random changes to training slices, a whole batch at a time, on any device.

All randomness comes from one CPU generator, so a seed gives the same batches on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How strongly slices are changed; every draw is uniform in -value..value around no change.

    Args:
        flip_horizontal: Mirror half of the slices left to right. Off: a mirrored liver lies on the wrong
            side, and left and right organs swap.
        flip_vertical: Mirror half of the slices top to bottom.
        rotation: Degrees.
        scale: Share of the size, 0.2 = 0.8..1.2 times.
        shift: Share of the side.
        bend: Share of the side by which a smooth random field moves pixels.
        gamma: Exponent of the grey values, as power of two: 0.5 = 0.71..1.41.
        contrast: Share by which grey values are stretched around the slice's mean.
        brightness: Added to grey values in 0..1.
        noise: Largest standard deviation of Gaussian noise, in grey values 0..1.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    rotation: float = 10.0
    scale: float = 0.15
    shift: float = 0.06
    bend: float = 0.02
    gamma: float = 0.4
    contrast: float = 0.25
    brightness: float = 0.1
    noise: float = 0.03

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            images: (B, 1, S, S) float32 in 0..1.
            labels: (B, 1, S, S) class channels, float32 whole numbers.
            generator: On the CPU; advanced by the same amount on every call.

        Returns:
            New images, clipped to 0..1, and labels of the same shapes.
        """
        grid = self._grid(len(images), images.shape[-1], generator).to(images.device)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        labels = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return self._intensity(images, generator), labels

    def _grid(self, batch: int, size: int, generator: torch.Generator) -> Tensor:
        """(B, S, S, 2): where each output pixel is read, in -1..1."""
        angle, zoom, x, y = _spread(4, batch, generator)
        angle = angle * math.radians(self.rotation)
        zoom = 1.0 + zoom * self.scale
        flips = torch.where(torch.rand((2, batch), generator=generator) < 0.5, -1.0, 1.0)
        horizontal = flips[0] if self.flip_horizontal else torch.ones(batch)
        vertical = flips[1] if self.flip_vertical else torch.ones(batch)
        matrix = torch.stack(
            [
                torch.stack([angle.cos() * zoom * horizontal, -angle.sin() * zoom, x * 2 * self.shift], 1),
                torch.stack([angle.sin() * zoom, angle.cos() * zoom * vertical, y * 2 * self.shift], 1),
            ],
            1,
        )
        grid = F.affine_grid(matrix, [batch, 1, size, size], align_corners=False)
        knots = torch.rand((batch, 2, 6, 6), generator=generator) * 2 - 1
        field = F.interpolate(knots, (size, size), mode="bicubic", align_corners=False)
        out: Tensor = grid + 2 * self.bend * field.permute(0, 2, 3, 1)
        return out

    def _intensity(self, images: Tensor, generator: torch.Generator) -> Tensor:
        gamma, contrast, brightness, noise = (
            v.to(images.device)[:, None, None, None] for v in _spread(4, len(images), generator)
        )
        grain = torch.randn(images.shape, generator=generator).to(images.device)
        out = images.clamp(0, 1) ** torch.exp2(gamma * self.gamma)
        mean = out.mean(dim=(1, 2, 3), keepdim=True)
        out = (out - mean) * (1 + contrast * self.contrast) + mean + brightness * self.brightness
        return (out + grain * noise.abs() * self.noise).clamp(0, 1)


def _spread(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """(count, batch) uniform in -1..1."""
    return torch.rand((count, batch), generator=generator) * 2 - 1
