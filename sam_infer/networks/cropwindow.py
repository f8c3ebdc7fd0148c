"""Windows of a slice image that are resampled to the network's square crop, and back.

A window is (x0, y0, width, height) in slice pixels, edges (not centres): crop pixel u of SIZE lies at
slice coordinate ``x0 + (u + 0.5) * width / SIZE - 0.5``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_infer.networks.promptchannels import SIZE
from sam_infer.types import Box

Window = tuple[float, float, float, float]

MARGIN = 1.5
SMALLEST = 16.0
SLENDEREST = 0.4


def box_window(box: Box, scale: float = MARGIN) -> Window:
    """The window around a box: its size times `scale`, neither tiny nor very slender.

    Args:
        box: (x0, y0, x1, y1) in slice pixels, outermost pixel centres included.
        scale: Window side over box side.
    """
    wide, tall = (box[2] - box[0] + 1) * scale, (box[3] - box[1] + 1) * scale
    wide, tall = max(wide, SLENDEREST * tall, SMALLEST), max(tall, SLENDEREST * wide, SMALLEST)
    return (box[0] + box[2] + 1 - wide) / 2, (box[1] + box[3] + 1 - tall) / 2, wide, tall


def window_matrix(window: Window) -> np.ndarray:
    """(2, 3) float64: crop pixel (u, v, 1) to slice pixel (x, y)."""
    x0, y0, wide, tall = window
    sx, sy = wide / SIZE, tall / SIZE
    return np.array([[sx, 0.0, x0 + 0.5 * sx - 0.5], [0.0, sy, y0 + 0.5 * sy - 0.5]])


def to_crop(points: np.ndarray, window: Window) -> np.ndarray:
    """(N, 2) slice xy to (N, 2) crop xy."""
    x0, y0, wide, tall = window
    scale = np.array([SIZE / wide, SIZE / tall])
    out: np.ndarray = (np.asarray(points, float) + 0.5 - [x0, y0]) * scale - 0.5
    return out


def crop_grid(matrices: Tensor) -> Tensor:
    """(B, 2, 3) crop-to-slice matrices to the slice xy of every crop pixel, (B, SIZE, SIZE, 2)."""
    steps = torch.arange(SIZE, dtype=torch.float32, device=matrices.device)
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([u, v, torch.ones_like(u)], -1) @ matrices[:, None].transpose(2, 3)


def pyramid(image: Tensor) -> list[Tensor]:
    """An image (H, W) and its means over 2 x 2, 4 x 4 and 8 x 8 pixels (edges repeated)."""
    height, width = image.shape
    padded = F.pad(image[None, None], (0, -width % 8, 0, -height % 8), mode="replicate")
    return [image] + [F.avg_pool2d(padded, 2**level)[0, 0] for level in (1, 2, 3)]


def sample_image(levels: list[Tensor], grid: Tensor, pixel: float) -> tuple[Tensor, Tensor]:
    """Resample an image at a grid from the pyramid level that fits, so that fine texture does not alias.

    Args:
        levels: From `pyramid`.
        grid: (B, S, S, 2) slice xy.
        pixel: Size of a crop pixel in slice pixels.

    Returns:
        image: (B, S, S); 0 beyond the image. valid: (B, S, S); 1 inside, 0 beyond.
    """
    level = int(np.clip(np.round(np.log2(max(pixel, 1e-6))), 0, len(levels) - 1))
    source, factor = levels[level], 2**level
    height, width = levels[0].shape
    size = grid.new_tensor([source.shape[1] * factor, source.shape[0] * factor])
    where = (grid + 0.5) * 2 / size - 1
    image = F.grid_sample(
        source[None, None].expand(len(grid), -1, -1, -1), where, padding_mode="border", align_corners=False
    )[:, 0]
    x, y = grid.unbind(-1)
    valid = ((x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)).float()
    return image * valid, valid


def paste(logits: Tensor, window: Window, size: tuple[int, int], outside: float) -> Tensor:
    """Bring a crop's logits (S, S) back to a slice of `size` (H, W); `outside` beyond the window."""
    x0, y0, wide, tall = window
    left, top = max(int(np.ceil(x0)), 0), max(int(np.ceil(y0)), 0)
    right, bottom = min(int(np.ceil(x0 + wide)), size[1]), min(int(np.ceil(y0 + tall)), size[0])
    out = logits.new_full(size, outside)
    if right <= left or bottom <= top:
        return out
    x = (torch.arange(left, right, device=logits.device) + 0.5 - x0) * (2 / wide) - 1
    y = (torch.arange(top, bottom, device=logits.device) + 0.5 - y0) * (2 / tall) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(logits.dtype)
    part = F.grid_sample(logits[None, None], grid, padding_mode="border", align_corners=False)
    out[top:bottom, left:right] = part[0, 0]
    return out
