"""What the bundled network sees: a square crop and its prompts, drawn as image channels.

Training and inference both call `prompt_channels`, so they cannot drift apart. Everything is in crop
pixels: x = column, y = row, pixel centres at integers, the crop is SIZE x SIZE.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 128
VERSION = "2"
CHANNELS = (
    "image", "valid", "box", "ellipse", "positive", "negative", "positive_wide", "negative_wide",
    "previous", "posterior", "posterior_smooth", "posterior_blurred", "posterior_texture",
    "distance_inside", "distance_outside", "reach",
)  # fmt: skip
_BINS = 32
_FLOOD_STEPS = 24


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """Crops and their prompts.

    Args:
        image: (B, S, S) float32 in 0..1.
        valid: (B, S, S) float32, 1 inside the slice image and 0 beyond its border.
        box: (B, 4) float32 xyxy in crop pixels; NaN where a crop has no box.
        points: (B, N, 3) float32: x, y in crop pixels and the label (1, 0, or -1 for padding).
        previous: (B, S, S) float32, logits of a previous mask; all zero where there is none.
    """

    image: Tensor
    valid: Tensor
    box: Tensor
    points: Tensor
    previous: Tensor

    def to(self, device: torch.device | str) -> CropBatch:
        """The same batch on another device."""
        return CropBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, index: Tensor) -> CropBatch:
        """The crops of an index tensor."""
        return CropBatch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def prompt_channels(batch: CropBatch) -> Tensor:
    """Draw image and prompts as the network's input.

    Args:
        batch: Crops of S = SIZE pixels a side.

    Returns:
        (B, len(CHANNELS), S, S) float32.
    """
    image, valid = batch.image, batch.valid
    area = valid.sum((1, 2), keepdim=True).clamp_min(1.0)
    mean = (image * valid).sum((1, 2), keepdim=True) / area
    std = (((image - mean).square() * valid).sum((1, 2), keepdim=True) / area).sqrt()
    z = ((image - mean) / (std + 1e-3)).clamp(-3.0, 3.0) * valid

    inside_box, radius, has_box = _draw_box(batch.box, image)
    points = batch.points[:, (batch.points[..., 2] >= 0).any(0)]
    narrow = [_draw_points(points, label, 2.0) for label in (1, 0)]
    wide = [_draw_points(points, label, 10.0) for label in (1, 0)]
    seed = [_draw_points(points, label, 3.5) for label in (1, 0)]
    has_previous = (batch.previous.abs().amax((1, 2), keepdim=True) > 0).float()

    before = torch.sigmoid(batch.previous.clamp(-12.0, 12.0))
    centre = (1.0 - radius.square()).clamp_min(0.0) * has_box
    inside = has_previous * before + (1.0 - has_previous) * centre
    inside = (inside * (1.0 - seed[1]) + 2.0 * seed[0]) * valid
    outside = has_previous * (1.0 - before) + (1.0 - has_previous) * (1.0 - inside_box * has_box)
    outside = (outside * (1.0 - seed[0]) + 2.0 * seed[1]) * valid

    slight, blurred = _blur(z, 1.0), _blur(z, 2.5)
    texture = (_blur(z.square(), 2.0) - _blur(z, 2.0).square()).clamp_min(0.0).sqrt() * 2.0 - 2.0
    posterior = _posterior(torch.stack([z, blurred, texture], 1), inside, outside)
    at_inside = _weighted_mean(slight, inside)
    at_outside = _weighted_mean(slight, outside)
    start = torch.maximum(seed[0], torch.maximum(has_previous * (before - 0.5) * 2.0, centre * 2.0 - 1.0))
    reach = _flood(start.clamp(0.0, 1.0), 0.5 * (posterior[:, 0] + posterior[:, 1]))

    channels = [
        z, valid, inside_box * has_box, (1.0 - radius).clamp(-1.0, 1.0) * has_box,
        narrow[0], narrow[1], wide[0], wide[1], (batch.previous / 4.0).clamp(-2.0, 2.0),
        posterior[:, 0], _blur(posterior[:, 0], 2.0), posterior[:, 1], posterior[:, 2],
        (slight - at_inside).clamp(-3.0, 3.0), (slight - at_outside).clamp(-3.0, 3.0), reach,
    ]  # fmt: skip
    return torch.stack(channels, 1)


def _axes(like: Tensor) -> tuple[Tensor, Tensor]:
    steps = torch.arange(like.shape[-1], device=like.device, dtype=torch.float32)
    return steps[None, None, :], steps[None, :, None]


def _draw_box(box: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The filled box, the elliptic radius (1 on the ellipse in the box) and the flag, each (B, ...)."""
    x, y = _axes(image)
    has_box = torch.isfinite(box).all(1).float()[:, None, None]
    x0, y0, x1, y1 = (v[:, None, None] for v in torch.nan_to_num(box).unbind(1))
    half_x, half_y = (x1 - x0).clamp_min(1.0) / 2 + 0.5, (y1 - y0).clamp_min(1.0) / 2 + 0.5
    dx, dy = (x - (x0 + x1) / 2).abs(), (y - (y0 + y1) / 2).abs()
    inside = (half_x - dx + 0.5).clamp(0.0, 1.0) * (half_y - dy + 0.5).clamp(0.0, 1.0)
    return inside, ((dx / half_x).square() + (dy / half_y).square()).sqrt(), has_box


def _draw_points(points: Tensor, label: int, sigma: float) -> Tensor:
    """(B, S, S): the maximum of Gaussians (sigma in crop pixels) at the points of one label."""
    steps = torch.arange(SIZE, device=points.device, dtype=torch.float32)
    wanted = (points[..., 2] == label).float()
    if not points.shape[1]:
        return points.new_zeros((len(points), SIZE, SIZE))
    along_x = torch.exp(-0.5 * ((steps - points[..., 0, None]) / sigma).square())
    along_y = torch.exp(-0.5 * ((steps - points[..., 1, None]) / sigma).square())
    return (along_y[..., :, None] * (along_x * wanted[..., None])[..., None, :]).amax(1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, S, S), sigma in pixels, edges repeated."""
    weights = _blur_matrix(image.shape[-1], sigma).to(image.device)
    return weights @ image @ weights.T


@functools.cache
def _blur_matrix(size: int, sigma: float) -> Tensor:
    """(size, size): one row's blur as a product, several times faster than convolving a single channel."""
    reach = int(2.5 * sigma + 0.5)
    steps = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (steps / sigma).square())
    source = (torch.arange(size)[:, None] + steps).clamp(0, size - 1)
    kernel = (kernel / kernel.sum()).expand(size, -1)
    return torch.zeros(size, size).scatter_add(1, source, kernel)


def _weighted_mean(image: Tensor, weight: Tensor) -> Tensor:
    return (image * weight).sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True).clamp_min(1e-3)


def _posterior(values: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """How much likelier a value is inside than outside, at equal prior.

    Args:
        values: (B, F, S, S) float32, features in about -3..3.
        inside: (B, S, S) weights of the pixels taken as inside.
        outside: (B, S, S) likewise outside.

    Returns:
        (B, F, S, S) in 0..1: h_in / (h_in + h_out) of smoothed histograms, read off with linear
        interpolation.
    """
    batch, features = values.shape[:2]
    place = ((values + 3.0) / 6.0).clamp(0.0, 1.0).flatten(2) * (_BINS - 1)
    low = place.floor().clamp(max=_BINS - 2)
    fraction = place - low
    index = low.long()
    histograms = []
    for weight in (inside, outside):
        w = weight.flatten(1)[:, None].expand(-1, features, -1)
        bins = values.new_zeros((batch, features, _BINS))
        bins = bins.scatter_add(2, index, w * (1.0 - fraction)).scatter_add(2, index + 1, w * fraction)
        smooth = values.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0])[None, None] / 16.0
        bins = F.conv1d(bins.reshape(batch * features, 1, _BINS), smooth, padding=2)
        bins = bins.reshape(batch, features, _BINS)
        histograms.append(bins / bins.sum(2, keepdim=True).clamp_min(1e-6) + 2e-3)
    ratio = histograms[0] / (histograms[0] + histograms[1])
    left, right = ratio.gather(2, index), ratio.gather(2, index + 1)
    return (left + (right - left) * fraction).reshape(values.shape)


def _flood(start: Tensor, passable: Tensor) -> Tensor:
    """(B, S, S): how well each pixel is reached from the start through passable pixels."""
    scale = 4
    level = F.max_pool2d(start[:, None], scale)
    gate = (F.avg_pool2d(passable[:, None], scale) * 2.0 - 0.05).clamp(0.0, 1.0)
    for _ in range(_FLOOD_STEPS):
        level = torch.maximum(level, F.max_pool2d(level, 3, 1, 1) * gate)
    return F.interpolate(level, scale_factor=scale, mode="bilinear", align_corners=False)[:, 0]
