"""Cheap changes of a crop: grey values, noise, elastic displacement."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_infer.networks.cropwindow import Window
from sam_infer.networks.promptchannels import SIZE
from sam_infer.types import BoolArray


def augment_intensity(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Gamma, inversion, blur, bias field, noise and speckle, each at times.

    Args:
        image: (1, S, S) float32 in 0..1.
        rng: Source of every choice.

    Returns:
        (1, S, S) float32 in 0..1.
    """
    side = image.shape[-1]
    if rng.random() < 0.6:
        image = image.clamp(0, 1) ** float(np.exp(rng.uniform(-0.6, 0.6)))
    if rng.random() < 0.35:
        image = 1 - image
    if rng.random() < 0.3:
        bias = torch.from_numpy(rng.standard_normal((1, 1, 4, 4)).astype(np.float32))
        field = F.interpolate(bias, size=(side, side), mode="bicubic", align_corners=False)[0]
        image = image * (1 + float(rng.uniform(0, 0.25)) * field)
    if rng.random() < 0.2:
        width = int(rng.choice([3, 5]))
        image = F.avg_pool2d(image[None], width, 1, width // 2, count_include_pad=False)[0]
    if rng.random() < 0.4:
        coarse = int(rng.choice([side, side, side // 2, side // 3]))
        noise = torch.from_numpy(rng.standard_normal((1, 1, coarse, coarse), dtype=np.float32))
        if coarse != side:
            noise = F.interpolate(noise, size=(side, side), mode="bilinear", align_corners=False)
        if rng.random() < 0.6:
            image = image + float(rng.uniform(0, 0.08)) * noise[0]
        else:
            image = image * (1 + float(rng.uniform(0, 0.4)) * noise[0])
    return image.clamp(0, 1)


def random_displacement(rng: np.random.Generator, window: Window, side: int = SIZE) -> Tensor:
    """(1, S, S, 2) float32: a smooth displacement of up to a few percent of the window, frame units."""
    coarse = rng.standard_normal((1, 2, 6, 6)).astype(np.float32) * float(rng.uniform(0.003, 0.02))
    fine = F.interpolate(torch.from_numpy(coarse), size=(side, side), mode="bicubic", align_corners=False)
    return fine.permute(0, 2, 3, 1) * torch.tensor([window[2], window[3]], dtype=torch.float32)


def resample_mask(mask: BoolArray, grid: Tensor) -> Tensor:
    """A mask (H, W) looked up at a grid (1, S, S, 2) of slice xy: (1, S, S) float32, 0 or 1."""
    size = torch.tensor([mask.shape[1], mask.shape[0]], dtype=torch.float32)
    where = (grid + 0.5) * 2 / size - 1
    source = torch.from_numpy(mask.astype(np.float32))[None, None]
    return (F.grid_sample(source, where, align_corners=False)[:, 0] > 0.5).float()
