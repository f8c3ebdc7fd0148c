"""Where the bundled engine looks for a prompt's object, and the crops that it takes there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_infer.engines.base import Embedding
from sam_infer.geometry import tight_box, union_box
from sam_infer.networks.cropwindow import Window, box_window, crop_grid, sample_image, to_crop, window_matrix
from sam_infer.networks.promptchannels import SIZE, CropBatch
from sam_infer.types import Box, FloatArray, Prompts


def prompt_windows(prompt: Prompts, size: tuple[int, int]) -> list[Window]:
    """The windows of an image in which a prompt is answered.

    Args:
        prompt: Not empty.
        size: (H, W) of the slice.

    Returns:
        One window around box, previous mask and foreground clicks where there is a box or a mask; more
        for clicks without a box: squares of the whole, half and quarter image.
    """
    boxes: list[Box] = [] if prompt.box is None else [prompt.box]
    shown = None if prompt.mask_logits is None else tight_box(prompt.mask_logits > 0)
    if shown is not None:
        boxes.append(shown)
    windows = []
    points = [(float(x), float(y), float(x), float(y)) for x, y in prompt.positive]
    if boxes:
        windows.append(box_window(union_box(boxes + points)))
    if prompt.box is None and points:
        windows += _click_windows(union_box(points), size)
    return windows or [_click_windows((0.0, 0.0, size[1] - 1.0, size[0] - 1.0), size)[0]]


def closer_prompt(prompt: Prompts, logits: FloatArray) -> Prompts | None:
    """The prompt with an answer's mask and its box added; None where the mask is empty.

    Args:
        prompt: Clicks.
        logits: (H, W) float32, the answer.
    """
    box = tight_box(logits > 0)
    return None if box is None else replace(prompt, box=box, mask_logits=logits)


def _click_windows(clicks: Box, size: tuple[int, int]) -> list[Window]:
    """Squares of the whole, half and quarter image around the clicks, shifted to lie in the image."""
    height, width = size
    windows: list[Window] = []
    for share in (1.0, 0.5, 0.25):
        side = max(share * max(height, width), 24.0)
        if share < 1 and max(clicks[2] - clicks[0], clicks[3] - clicks[1]) > 0.9 * side:
            continue
        corner = []
        for low, high, length in ((clicks[0], clicks[2], width), (clicks[1], clicks[3], height)):
            start = (low + high + 1 - side) / 2
            corner.append((length - side) / 2 if side >= length else min(max(start, 0.0), length - side))
        windows.append((corner[0], corner[1], side, side))
    return windows


def draw_crops(embedding: Embedding, windows: list[Window], prompts: list[Prompts]) -> CropBatch:
    """Resample each window and bring its prompt into crop pixels.

    Args:
        embedding: Of `BundledEngine.encode`.
        windows: B windows.
        prompts: The prompt of each window, B.

    Returns:
        B crops on the embedding's device.
    """
    levels = [embedding.features[f"level{n}"] for n in range(len(embedding.features))]
    device = levels[0].device
    most = max([len(p.points) for p in prompts] + [1])
    box = torch.full((len(windows), 4), torch.nan)
    points = torch.full((len(windows), most, 3), -1.0)
    images, valids, previous = [], [], []
    for n, (window, prompt) in enumerate(zip(windows, prompts, strict=True)):
        matrix = torch.from_numpy(window_matrix(window)).float()[None].to(device)
        grid = crop_grid(matrix)
        image, valid = sample_image(levels, grid, float(np.sqrt(window[2] * window[3])) / SIZE)
        images.append(image)
        valids.append(valid)
        if prompt.box is not None:
            corners = to_crop(np.array(prompt.box).reshape(2, 2), window)
            box[n] = torch.from_numpy(corners).float().flatten()
        if len(prompt.points):
            points[n, : len(prompt.points), :2] = torch.from_numpy(to_crop(prompt.points, window)).float()
            points[n, : len(prompt.points), 2] = torch.from_numpy(prompt.point_labels.astype(np.float32))
        previous.append(_sample_logits(prompt.mask_logits, grid))
    return CropBatch(
        image=torch.cat(images), valid=torch.cat(valids), box=box.to(device), points=points.to(device),
        previous=torch.cat(previous),
    )  # fmt: skip


def _sample_logits(logits: FloatArray | None, grid: Tensor) -> Tensor:
    if logits is None:
        return grid.new_zeros(grid.shape[:3])
    source = torch.from_numpy(np.clip(logits, -12, 12).astype(np.float32)).to(grid.device)[None, None]
    where = (grid + 0.5) * 2 / grid.new_tensor([source.shape[3], source.shape[2]]) - 1
    return F.grid_sample(source, where, padding_mode="border", align_corners=False)[:, 0]


def with_previous(crops: CropBatch, logits: Tensor) -> CropBatch:
    """The crops with logits (B, S, S) as their previous mask."""
    return CropBatch(
        image=crops.image, valid=crops.valid, box=crops.box, points=crops.points,
        previous=logits.clamp(-12.0, 12.0),
    )  # fmt: skip


def wants_second_look(crops: CropBatch, logits: Tensor) -> Tensor:
    """(B,) bool: a box without a previous mask, or a click inside the crop that the answer disobeys.

    On held-out patients a second look makes answers to boxes better and answers to clicks alone worse.
    """
    fresh_box = torch.isfinite(crops.box).all(1) & (crops.previous.abs().amax((1, 2)) == 0)
    place = crops.points[..., :2].round().long()
    inside = ((place >= 0) & (place < SIZE)).all(-1) & (crops.points[..., 2] >= 0)
    place = place.clamp(0, SIZE - 1)
    rows = torch.arange(len(crops.points), device=logits.device)[:, None]
    answer = logits[rows, place[..., 1], place[..., 0]] > 0
    return fresh_box | (inside & (answer != (crops.points[..., 2] == 1))).any(1)
