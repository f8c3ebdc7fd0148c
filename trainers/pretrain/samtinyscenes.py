"""Training scenes of ``sam_tiny``: one image as its encoder sees it, with several prompted objects.

Encoding is dear and decoding another prompt is cheap, so every image comes with several prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sam_infer.geometry import largest_component, tight_box
from sam_infer.networks.cropwindow import Window, pyramid, sample_image
from sam_infer.networks.samtiny import PIXEL_MEAN, PIXEL_STD, SIDE
from sam_infer.prompts.simulated import jitter_box, next_click
from sam_infer.types import BoolArray
from trainers.pretrain.augment import augment_intensity, random_displacement, resample_mask
from trainers.pretrain.frame import inverse, random_turn
from trainers.pretrain.pool import Pool
from trainers.pretrain.recipe import TinyRecipe
from trainers.pretrain.sampler import choose_kind
from trainers.pretrain.synthetic import PARTS, SYNTHETIC

LOW = SIDE // 2
_SMALLEST = 80


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of images with K prompts each.

    Args:
        image: (B, 1, 256, 256) float32, grey, normalised, 0 in the padding.
        truth: (B, K, 128, 128) float32, the share of each pixel that the object covers.
        box: (B, K, 4) float32 xyxy in pixels of the 256 px image; NaN where there is none.
        click: (B, K, 2) float32 xy of a foreground click; NaN where there is none.
        previous: (B, K, 128, 128) float32, logits of a previous mask; all 0 where there is none.
    """

    image: Tensor
    truth: Tensor
    box: Tensor
    click: Tensor
    previous: Tensor

    def to(self, device: str) -> Scenes:
        """The same batch on a device."""
        return Scenes(**{name: value.to(device) for name, value in vars(self).items()})


class SceneSampler(Dataset[Scenes]):
    """Batches of scenes by step number: the same seed and step give the same batch.

    Args:
        pool: Where the images come from.
        recipe: Shares of prompts and kinds.
        seed: Of every random choice.
    """

    def __init__(self, pool: Pool, recipe: TinyRecipe, *, seed: int) -> None:
        self.pool, self.recipe, self.seed = pool, recipe, seed

    def __getitem__(self, step: int) -> Scenes:
        rng = np.random.default_rng([self.seed, 13, step])
        only_masks = bool(rng.random() < self.recipe.mask_only_share)
        parts = [self.draw(rng, only_masks) for _ in range(self.recipe.images)]
        return Scenes(**{n: torch.cat([getattr(p, n) for p in parts]) for n in vars(parts[0])})

    def draw(self, rng: np.random.Generator, only_masks: bool) -> Scenes:
        """One image with its prompts, a batch of one."""
        for _ in range(50):
            image, labels = self._image(rng)
            drawn = _draw_scene(image, labels, only_masks, self.recipe, rng)
            if drawn is not None:
                return drawn
        raise RuntimeError("the pool holds no usable object; make it again with more images")

    def _image(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        kind = choose_kind(self.pool.groups, self.recipe, rng)
        members = self.pool.groups[kind]
        image, labels = self.pool[members[int(rng.integers(len(members)))]]
        present = np.unique(labels[labels > 0])
        if kind == PARTS and rng.random() < self.recipe.together_share:
            labels = (labels > 0).astype(np.uint8)
        elif kind == SYNTHETIC and len(present) > 2 and rng.random() < 0.05:
            joined = rng.choice(present, min(len(present), int(rng.integers(2, 30))), False)
            labels = np.where(np.isin(labels, joined), joined[0], labels)
        return image, labels


def _draw_scene(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], only_masks: bool, recipe: TinyRecipe,
    rng: np.random.Generator,
) -> Scenes | None:  # fmt: skip
    sizes = np.bincount(labels.ravel(), minlength=2)
    sizes[0] = 0
    good = np.flatnonzero((sizes > 30) & (sizes < 0.7 * labels.size))
    if not len(good):
        return None
    anchor = int(rng.choice(good, p=np.sqrt(sizes[good]) / np.sqrt(sizes[good]).sum()))
    turn = random_turn(rng)
    height, width = labels.shape
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    window = _window(labels == anchor, turn, centre, recipe, rng)
    if window is None:
        return None
    pixel = max(window[2], window[3]) / SIDE
    steps = (torch.arange(SIDE, dtype=torch.float32) + 0.5) * pixel
    frame = torch.stack(torch.meshgrid(steps + window[0], steps + window[1], indexing="xy"), -1)[None]
    inside = (steps < window[2])[None, :] & (steps < window[3])[:, None]
    if rng.random() < 0.4:
        frame = frame + random_displacement(rng, window, SIDE)
    grid = frame @ torch.from_numpy(turn.T.copy()).float() + torch.from_numpy(centre).float()
    levels = pyramid(torch.from_numpy(image.astype(np.float32) / 255))
    picture, valid = sample_image(levels, grid, pixel)
    picture = augment_intensity(picture, rng) * valid
    picture = (picture * 255 - PIXEL_MEAN) / PIXEL_STD * inside

    xy = grid[0].numpy().round().astype(np.int64)
    seen = labels[xy[..., 1].clip(0, height - 1), xy[..., 0].clip(0, width - 1)]
    seen = np.where((valid[0].numpy() > 0) & inside.numpy(), seen, 0)
    areas = np.bincount(seen.ravel(), minlength=2)
    areas[0] = 0
    shown = np.flatnonzero((areas >= _SMALLEST) & (areas < 0.8 * int(inside.sum())))
    if anchor not in shown:
        return None
    chance = np.sqrt(areas[shown]) / np.sqrt(areas[shown]).sum()
    chosen = [anchor, *rng.choice(shown, recipe.prompts - 1, p=chance)]
    masks: dict[int, BoolArray] = {}
    rows = []
    for label in chosen:
        label = int(label)
        if label not in masks:
            masks[label] = (resample_mask(labels == label, grid)[0] > 0).numpy() & inside.numpy()
        mask = masks[label]
        if rng.random() < 0.4:
            mask = largest_component(mask)
        if mask.sum() < _SMALLEST / 2:
            return None
        rows.append(_prompt(mask, only_masks, recipe, rng))
    truth, box, click, previous = (torch.stack([row[n] for row in rows])[None] for n in range(4))
    return Scenes(image=picture[None], truth=truth, box=box, click=click, previous=previous)


def _window(
    mask: BoolArray, turn: NDArray[np.float64], centre: NDArray[np.float64], recipe: TinyRecipe,
    rng: np.random.Generator,
) -> Window | None:  # fmt: skip
    """The rectangle that is shown, in the turned frame around the image's centre."""
    back = inverse(turn).T
    corners = (centre * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])) @ back
    limits = np.concatenate([corners.min(0) - 0.5, corners.max(0) + 0.5])
    if rng.random() < recipe.whole_share:
        low, high = limits[:2], limits[2:]
        cut = (high - low) * rng.uniform(0, 0.12, (2, 2)) * (rng.random() < 0.5)
        low, high = low + cut[0], high - cut[1]
    else:
        ys, xs = np.nonzero(mask)
        keep = slice(None, None, max(len(xs) // 1500, 1))
        at = (np.stack([xs[keep], ys[keep]], 1) - centre) @ back
        least, most = at.min(0) - 0.5, at.max(0) + 0.5
        size, middle = most - least, (least + most) / 2
        slender = rng.random() < 0.5
        size = np.maximum(size, (0.4 if slender else 1.0) * size.max())
        zoom = np.exp(rng.uniform(np.log(1.3), np.log(2.2 if rng.random() < 0.5 else 7.0)))
        side = np.maximum(size * zoom, 24.0)
        middle = middle + rng.uniform(-1, 1, 2) * (side - (most - least)) / 2 * rng.choice([0.2, 1.0])
        low, high = np.maximum(middle - side / 2, limits[:2]), np.minimum(middle + side / 2, limits[2:])
    if (high - low).min() < 12:
        return None
    return float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])


def _prompt(
    mask: BoolArray, only_mask: bool, recipe: TinyRecipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    truth = F.avg_pool2d(torch.from_numpy(mask.astype(np.float32))[None], 2)[0]
    box, click = torch.full((4,), torch.nan), torch.full((2,), torch.nan)
    previous = torch.zeros(LOW, LOW)
    roll = rng.random()
    if only_mask:
        previous, _ = _neighbour(mask, rng)
    elif roll < recipe.box_share + recipe.mask_share:
        seen = mask
        if roll >= recipe.box_share:
            previous, seen = _neighbour(mask, rng)
        tight = tight_box(seen)
        if tight is None:
            tight = tight_box(mask)
        assert tight is not None
        fraction = recipe.jitter * rng.random() if rng.random() < 0.65 else 0.0
        box = torch.tensor(jitter_box(tight, fraction, rng, (SIDE, SIDE)))
    else:
        click = torch.tensor(_inner_point(mask, rng))
    return truth, box, click, previous


def _inner_point(mask: BoolArray, rng: np.random.Generator) -> tuple[float, float]:
    if rng.random() < 0.65:
        found = next_click(mask, np.zeros_like(mask))
        assert found is not None
        return found[0], found[1]
    ys, xs = np.nonzero(mask)
    pick = int(rng.integers(len(xs)))
    return float(xs[pick]), float(ys[pick])


def _neighbour(mask: BoolArray, rng: np.random.Generator) -> tuple[Tensor, BoolArray]:
    """Logits (128, 128) of the object as a neighbouring slice shows it, and that mask (256, 256)."""
    tight = tight_box(mask)
    assert tight is not None
    size = np.array([tight[2] - tight[0] + 1, tight[3] - tight[1] + 1])
    middle = np.array([tight[0] + tight[2], tight[1] + tight[3]]) / 2
    scale, shift = np.exp(rng.uniform(-0.3, 0.3, 2)), rng.uniform(-0.15, 0.15, 2) * size
    u, v = ((np.arange(SIDE) - shift[n] - middle[n]) / scale[n] + middle[n] for n in (0, 1))
    grid = torch.stack(torch.meshgrid(torch.tensor(u), torch.tensor(v), indexing="xy"), -1)[None].float()
    shown = resample_mask(mask, grid)
    width = int(rng.choice([3, 5, 9]))
    soft = F.avg_pool2d(F.avg_pool2d(shown[None], 2), width, 1, width // 2)[0, 0]
    top = rng.uniform(3, 10)
    return ((soft - 0.5) * rng.uniform(6, 20)).clamp(-top, top), shown[0].numpy() > 0
