"""Crops with prompts and truths, drawn from the pool: the same seed and step give the same batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sam_infer.geometry import tight_box
from sam_infer.networks.cropwindow import Window, box_window, crop_grid, pyramid, sample_image, window_matrix
from sam_infer.networks.promptchannels import SIZE, CropBatch
from sam_infer.prompts.simulated import next_click
from sam_infer.types import BoolArray, Box
from trainers.pretrain.augment import augment_intensity, random_displacement, resample_mask
from trainers.pretrain.frame import inverse, jitter_in_frame, neighbour, random_turn
from trainers.pretrain.pool import Pool
from trainers.pretrain.recipe import Common, Recipe
from trainers.pretrain.synthetic import PARTS, SYNTHETIC

MAX_POINTS = 8
_REAL_WEIGHTS = {
    "cxr_lung_v7": 4.0, "mr_wholeheart_hvsmr2": 1.2, "multi_medscribble": 0.7,
    "ct_totalseg_examples": 3.0, "ct_totalseg_vessels": 0.5, "ctmr_sts_mass": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One training crop or a batch of them.

    Args:
        crops: What the network is given.
        truth: (B, S, S) float32, 0 or 1.
        beyond: (B,) float32, pixels of the object beyond the crop, in crop pixels.
    """

    crops: CropBatch
    truth: Tensor
    beyond: Tensor


class Sampler(Dataset[Drawn]):
    """Batches by step number.

    Args:
        pool: Where the images come from.
        recipe: Shares of prompts and kinds.
        seed: Of every random choice.
        size: Crops a batch.
    """

    def __init__(self, pool: Pool, recipe: Recipe, *, seed: int, size: int) -> None:
        self.pool, self.recipe, self.seed, self.size = pool, recipe, seed, size

    def __getitem__(self, step: int) -> Drawn:
        rng = np.random.default_rng([self.seed, 3, step])
        return stack([self.draw(rng) for _ in range(self.size)])

    def draw(self, rng: np.random.Generator) -> Drawn:
        """One crop, a batch of one."""
        for _ in range(50):
            found = self._object(rng)
            if found is not None:
                image, mask = found
                drawn = _draw_crop(image, mask, self.recipe, rng)
                if drawn is not None:
                    return drawn
        raise RuntimeError("the pool holds no usable object; make it again with more images")

    def _object(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], BoolArray] | None:
        kind = choose_kind(self.pool.groups, self.recipe, rng)
        members = self.pool.groups[kind]
        image, labels = self.pool[members[int(rng.integers(len(members)))]]
        sizes = np.bincount(labels.ravel(), minlength=2)
        sizes[0] = 0
        good = np.flatnonzero((sizes > 30) & (sizes < 0.7 * labels.size))
        if not len(good):
            return None
        chosen = rng.choice(good, p=np.sqrt(sizes[good]) / np.sqrt(sizes[good]).sum())
        mask: BoolArray = labels == chosen
        if kind == PARTS and rng.random() < self.recipe.together_share:
            mask = labels > 0
        elif kind == SYNTHETIC and len(good) > 2 and rng.random() < 0.05:
            mask = np.isin(labels, rng.choice(good, min(len(good), int(rng.integers(2, 30))), False))
        return image, mask


def choose_kind(groups: Mapping[str, Sequence[int]], recipe: Common, rng: np.random.Generator) -> str:
    """Which kind of image the next one is.

    Args:
        groups: The pool's.
        recipe: Shares of kinds.
        rng: Of the choice.
    """
    kinds = [k for k in _REAL_WEIGHTS if k in groups]
    made = [k for k in (SYNTHETIC, PARTS) if k in groups]
    if made and (not kinds or rng.random() < recipe.synthetic_share):
        counts = np.array([len(groups[k]) for k in made])
        return made[int(rng.choice(len(made), p=counts / counts.sum()))]
    if "pseudo" in groups and rng.random() < recipe.pseudo_share:
        return "pseudo"
    weights = np.array([_REAL_WEIGHTS[k] for k in kinds])
    return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]


def stack(parts: list[Drawn]) -> Drawn:
    """Join batches along B."""
    names = ("image", "valid", "box", "points", "previous")
    crops = {n: torch.cat([getattr(p.crops, n) for p in parts]) for n in names}
    return Drawn(
        crops=CropBatch(**crops),
        truth=torch.cat([p.truth for p in parts]),
        beyond=torch.cat([p.beyond for p in parts]),
    )


def _draw_crop(
    image: NDArray[np.uint8], mask: BoolArray, recipe: Recipe, rng: np.random.Generator
) -> Drawn | None:
    ys, xs = np.nonzero(mask)
    turn = random_turn(rng)
    centre = np.array([xs.mean(), ys.mean()])
    keep = slice(None, None, max(len(xs) // 1500, 1))
    frame = (np.stack([xs[keep], ys[keep]], 1) - centre) @ inverse(turn).T
    tight: Box = (*frame.min(0), *frame.max(0))  # type: ignore[assignment]
    size = np.array([tight[2] - tight[0] + 1, tight[3] - tight[1] + 1])

    roll = rng.random()
    mode = (
        "box"
        if roll < recipe.box_share
        else "mask"
        if roll < recipe.box_share + recipe.mask_share
        else "click"
    )
    before, prompt_box = None, None
    if mode == "click":
        start = _inner_point(mask, ys, xs, rng)
        at = inverse(turn) @ (start - centre)
        low, high = (1.3, 7.0) if rng.random() < 0.85 else (0.7, 1.3)
        side = max(size.max() * np.exp(rng.uniform(np.log(low), np.log(high))), 24.0)
        side = min(side, 1.1 * max(mask.shape))
        offset = at + rng.uniform(-1, 1, 2) * side * (0.05 if rng.random() < 0.6 else 0.35)
        window: Window = (offset[0] - side / 2, offset[1] - side / 2, side, side)
    else:
        seen = tight
        if mode == "mask":
            before, seen = neighbour(tight, size, rng)
        fraction = recipe.jitter * rng.random() if rng.random() < 0.65 else 0.0
        prompt_box = jitter_in_frame(seen, fraction, rng)
        window = box_window(prompt_box, rng.uniform(1.25, 1.9) if rng.random() < 0.7 else 1.5)

    matrix = window_matrix(window)
    grid = crop_grid(torch.from_numpy(matrix).float()[None])
    bend = random_displacement(rng, window) if rng.random() < 0.4 else None
    bent = grid if bend is None else grid + bend
    spin = torch.from_numpy(turn.T.copy()).float()
    middle = torch.from_numpy(centre).float()
    pixel = float(np.sqrt(window[2] * window[3]) / SIZE)
    levels = pyramid(torch.from_numpy(image.astype(np.float32) / 255))
    picture, valid = sample_image(levels, bent @ spin + middle, pixel)
    truth = resample_mask(mask, bent @ spin + middle)
    inside = int(truth.sum())
    if inside < 20:
        return None
    beyond = max(len(xs) / pixel**2 - inside, 0.0) if mode == "click" else 0.0

    previous = torch.zeros(1, SIZE, SIZE)
    if before is not None:
        previous = _previous_logits(mask, before(bent) @ spin + middle, rng)
        shown = tight_box(previous[0].numpy() > 0)
        if shown is None:
            return None
    box = torch.full((1, 4), torch.nan)
    if prompt_box is not None and not (mode == "mask" and rng.random() < 0.25):
        corners = np.array(prompt_box).reshape(2, 2)
        box = torch.from_numpy(_into(corners, window)).float().reshape(1, 4)
    points = torch.full((1, MAX_POINTS, 3), -1.0)
    if mode == "click" or rng.random() < 0.2:
        clicks = _clicks(truth[0].numpy() > 0, mode == "click", rng)
        points[0, : len(clicks)] = torch.tensor(clicks)
    picture = augment_intensity(picture, rng) * valid
    crops = CropBatch(image=picture, valid=valid, box=box, points=points, previous=previous)
    return Drawn(crops=crops, truth=truth, beyond=torch.tensor([beyond], dtype=torch.float32))


def _inner_point(
    mask: BoolArray, ys: NDArray[np.int64], xs: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    if rng.random() < 0.65:
        click = next_click(mask, np.zeros_like(mask))
        assert click is not None
        return np.array(click[:2])
    pick = int(rng.integers(len(xs)))
    return np.array([xs[pick], ys[pick]], float)


def _previous_logits(mask: BoolArray, grid: Tensor, rng: np.random.Generator) -> Tensor:
    shown = resample_mask(mask, grid)
    side = int(rng.choice([3, 5, 9]))
    soft = torch.nn.functional.avg_pool2d(shown[None], side, 1, side // 2)[0]
    level = rng.uniform(0.3, 0.7)
    return ((soft - level) * rng.uniform(6, 20)).clamp(-rng.uniform(3, 10), rng.uniform(3, 10))


def _into(points: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    scale = np.array([SIZE / window[2], SIZE / window[3]])
    out: NDArray[np.float64] = (points + 0.5 - [window[0], window[1]]) * scale - 0.5
    return out


def _clicks(truth: BoolArray, first: bool, rng: np.random.Generator) -> list[list[float]]:
    ys, xs = np.nonzero(truth)
    clicks: list[list[float]] = []
    if rng.random() < 0.65:
        centre = next_click(truth, np.zeros_like(truth))
        assert centre is not None
        clicks.append(list(centre))
    else:
        pick = int(rng.integers(len(xs)))
        clicks.append([float(xs[pick]), float(ys[pick]), 1.0])
    if first and rng.random() < 0.25:
        out_y, out_x = np.nonzero(~truth)
        if len(out_x):
            pick = int(rng.integers(len(out_x)))
            clicks.append([float(out_x[pick]), float(out_y[pick]), 0.0])
    return clicks
