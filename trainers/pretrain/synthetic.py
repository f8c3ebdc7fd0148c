"""Images made by code, with a label map each: what the bundled model mostly learns from.

Every maker returns an image (S, S) float32 in about 0..1 and labels (S, S) uint8, 0 = background.
Contrast is kept low on purpose: fuzzy objects are what a small model fails at.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.types import FloatArray
from trainers.pretrain.harder import arches, cells, faint, rings, strips
from trainers.pretrain.shapes import SIDE, LabelArray, Made, Plane, blob, smooth_noise, soft_edge, speckle

SYNTHETIC, PARTS = "synthetic", "synthetic of parts"


def make_image(rng: np.random.Generator) -> tuple[NDArray[np.uint8], LabelArray, str]:
    """One image with labelled objects.

    Args:
        rng: Source of everything random: equal generators make equal images.

    Returns:
        image: (SIDE, SIDE) uint8. labels: (SIDE, SIDE) uint8, 0 = background. kind: `PARTS` where all
        labels together are an object too (all teeth), else `SYNTHETIC`.
    """
    makers, weights = zip(*_MAKERS, strict=True)
    share = np.array(weights) / sum(weights)
    maker = makers[int(rng.choice(len(makers), p=share))]
    image, labels = maker(rng)
    image = _degrade(image, rng)
    kind = PARTS if maker in _OF_PARTS else SYNTHETIC
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels, kind


def _lesions(rng: np.random.Generator) -> Made:
    """Fuzzy blobs of low contrast on layered tissue under speckle, some with a shadow or a bright rim."""
    rows = np.interp(np.arange(SIDE), np.linspace(0, SIDE, 9), rng.uniform(0.25, 0.7, 9)).astype(np.float32)
    shift = (smooth_noise(rng, 3) * 14).astype(np.int64)
    image = rows[np.clip(np.arange(SIDE)[:, None] + shift, 0, SIDE - 1)]
    image = image + 0.08 * smooth_noise(rng, int(rng.integers(5, 16)))
    labels = np.zeros((SIDE, SIDE), np.uint8)
    plane = Plane(rng, rng.uniform(0.1, 0.9))
    for index in range(1, int(rng.integers(2, 6))):
        level, radius = blob(plane, rng, 10, 60)
        contrast = rng.choice([-1, -1, -1, 1]) * rng.uniform(0.08, 0.35)
        soft = soft_edge(level, radius, rng.uniform(0.5, 12))
        inner = 0.06 * smooth_noise(rng, int(rng.integers(6, 24)))
        image = image + soft * (contrast + inner)
        if rng.random() < 0.3:
            image = image + rng.uniform(-0.2, 0.25) * np.exp(-((level * radius / rng.uniform(1.5, 4)) ** 2))
        if rng.random() < 0.3:
            columns = (level > 0).any(0) * rng.uniform(-0.2, 0.15)
            below: np.ndarray = np.arange(SIDE)[:, None] > np.argmax((level > 0).any(1))
            image = image + ndimage.gaussian_filter1d(columns, 4)[None, :] * below * (level < 0)
        labels[level > 0] = index
    return speckle(image, rng).astype(np.float32), labels


def _organs(rng: np.random.Generator) -> Made:
    """A body with organs painted over each other, grey values close together, small bright bones."""
    plane = Plane(rng, rng.uniform(0.3, 1.3))
    body = plane.ellipse(
        SIDE / 2, SIDE / 2, rng.uniform(85, 130), rng.uniform(70, 115), rng.uniform(-0.2, 0.2)
    )
    spread = rng.uniform(0.03, 0.2)
    image = np.where(body > 0, 0.3 + 0.03 * smooth_noise(rng, 12), 0.02).astype(np.float32)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for index in range(1, int(rng.integers(8, 26))):
        level, radius = blob(plane, rng, 5, 65)
        value = rng.normal(0.5, spread) if rng.random() < 0.85 else rng.uniform(0, 1)
        soft = soft_edge(level, radius, rng.uniform(0.5, 4)) * (body > 0).astype(np.float32)
        texture = rng.uniform(0, 0.05) * smooth_noise(rng, int(rng.integers(10, 60)))
        image = np.asarray(image * (1 - soft) + soft * (value + texture), np.float32)
        labels[(level > 0) & (body > 0)] = index
    return image, labels


def _partition(rng: np.random.Generator) -> Made:
    """A warped Voronoi partition: neighbours that touch everywhere, of similar grey."""
    plane = Plane(rng, rng.uniform(0.2, 1.6))
    count = int(rng.integers(5, 45))
    centres = rng.uniform(0, SIDE, (count, 2))
    stretch = np.exp(rng.uniform(-0.5, 0.5))
    best = np.full((SIDE, SIDE), np.inf, np.float32)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for index, (cx, cy) in enumerate(centres, 1):
        far = ((plane.x - cx) * stretch) ** 2 + ((plane.y - cy) / stretch) ** 2 - rng.uniform(0, 400)
        nearer = far < best
        labels[nearer], best[nearer] = index, far[nearer]
    values = rng.normal(0.5, rng.uniform(0.05, 0.2), count + 1).astype(np.float32)
    grain = rng.uniform(0, 0.08, count + 1).astype(np.float32)
    image = values[labels] + grain[labels] * smooth_noise(rng, int(rng.integers(15, 80)))
    if rng.random() < 0.4:
        wall = ndimage.morphological_gradient(labels, size=(3, 3)) > 0
        image = image + rng.uniform(-0.3, 0.3) * ndimage.gaussian_filter(wall.astype(np.float32), 1)
    if rng.random() < 0.5:
        image = ndimage.gaussian_filter(image, rng.uniform(0.5, 3))
    return image.astype(np.float32), labels


def _chest(rng: np.random.Generator) -> Made:
    """A projection: two big soft dark fields behind ribs, a bright middle; 1 = both fields."""
    plane = Plane(rng, rng.uniform(0.2, 0.8))
    image = 0.55 + 0.12 * smooth_noise(rng, 3)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    middle, half = SIDE / 2 + rng.normal(0, 6), rng.uniform(42, 58)
    top, tall = rng.uniform(90, 125), rng.uniform(60, 95)
    lungs = np.zeros((SIDE, SIDE), np.float32)
    for side in (-1, 1):
        level = plane.ellipse(
            middle + side * half, top + rng.normal(0, 5), half * rng.uniform(0.6, 0.9),
            tall * rng.uniform(0.85, 1.1), side * rng.uniform(-0.25, 0.05), rng.uniform(1.9, 3.2),
        )  # fmt: skip
        lungs = np.maximum(lungs, soft_edge(level, half * 0.7, rng.uniform(3, 16)))
        labels[level > 0] = 1
    image = image - lungs * rng.uniform(0.12, 0.4)
    heart = plane.ellipse(middle + 12, top + tall * 0.45, rng.uniform(28, 48), rng.uniform(25, 45), 0.5)
    image = image + soft_edge(heart, 30, rng.uniform(2, 10)) * rng.uniform(0.05, 0.3)
    phase = plane.y + 0.0035 * (plane.x - middle) ** 2 * rng.uniform(0.3, 1.2)
    ribs = np.maximum(np.sin(phase * 2 * np.pi / rng.uniform(14, 24)), 0) ** 2
    image = image + ribs * rng.uniform(0, 0.12) * (np.abs(plane.x - middle) < 2.1 * half)
    for _ in range(int(rng.integers(0, 5))):
        level, radius = blob(plane, rng, 12, 50)
        image = image + soft_edge(level, radius, radius * 0.8) * rng.uniform(-0.05, 0.25)
    spine = np.exp(-(((plane.x - middle) / rng.uniform(8, 16)) ** 2))
    image = image + spine * rng.uniform(0, 0.25) + 0.02 * smooth_noise(rng, 60)
    return image.astype(np.float32), labels


def _teeth(rng: np.random.Generator) -> Made:
    """Two bowed rows of rounded bright bars that fade into a textured ground; a label each."""
    plane = Plane(rng, rng.uniform(0.05, 0.35))
    image = 0.4 + 0.08 * smooth_noise(rng, 5) + 0.03 * smooth_noise(rng, 40)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    bow, gap = rng.uniform(-25, 25), rng.uniform(4, 14)
    index, contrast = 0, rng.uniform(0.08, 0.3)
    for row in (-1, 1):
        x = rng.uniform(5, 25)
        while x < SIDE - 15 and index < 60:
            width, length = rng.uniform(6, 13), rng.uniform(20, 42)
            bend = bow * ((x - SIDE / 2) / (SIDE / 2)) ** 2
            y = SIDE / 2 + bend + row * (length + gap / 2)
            level = plane.ellipse(x + width, y, width, length, rng.normal(0, 0.12), rng.uniform(2.2, 4))
            index += 1
            soft = soft_edge(level, width, rng.uniform(0.5, 4))
            crown = np.clip(1 - row * (plane.y - y) / length, 0.2, 2) * 0.6
            image = image + soft * contrast * crown
            if rng.random() < 0.3:
                image = image - 0.1 * np.exp(-(((plane.x - x - width) / 2) ** 2)) * soft
            labels[level > 0] = index
            x += 2 * width + rng.uniform(-3, 4)
    return image.astype(np.float32), labels


def _levels(rng: np.random.Generator) -> Made:
    """Regions of a smooth random field between two of its quantiles."""
    field = smooth_noise(rng, int(rng.integers(3, 10))) + 0.2 * smooth_noise(rng, int(rng.integers(10, 30)))
    cut = np.quantile(field, rng.uniform(0.55, 0.9))
    parts, _ = ndimage.label(field > cut)
    labels = np.where(parts <= 200, parts, 0).astype(np.uint8)
    edge = rng.uniform(0.02, 0.4)
    image = 0.45 + rng.choice([-1, 1]) * rng.uniform(0.08, 0.3) * np.tanh((field - cut) / edge)
    return (image + 0.05 * smooth_noise(rng, 30)).astype(np.float32), labels


def _bumps(rng: np.random.Generator) -> Made:
    """Rounded bumps of the ground's own colour, seen only by their shading, outline and highlight."""
    plane = Plane(rng, rng.uniform(0.1, 0.7))
    image = 0.5 + 0.12 * smooth_noise(rng, 3) + 0.05 * smooth_noise(rng, 14)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    light = rng.uniform(0, 2 * np.pi)
    for index in range(1, int(rng.integers(2, 6))):
        level, radius = blob(plane, rng, 12, 65)
        soft = soft_edge(level, radius, rng.uniform(1, 5))
        gy, gx = np.gradient(np.sqrt(np.clip(level, 0, 1)) * radius)
        shade = ndimage.gaussian_filter(np.cos(light) * gx + np.sin(light) * gy, 2)
        image = image + soft * (rng.uniform(0.02, 0.15) * shade + rng.normal(0, 0.05))
        image = image + rng.uniform(-0.2, 0.1) * np.exp(-((level * radius / rng.uniform(1.5, 5)) ** 2))
        labels[level > 0] = index
    for _ in range(int(rng.integers(0, 6))):
        level, radius = blob(plane, rng, 2, 8)
        image = image + 0.5 * soft_edge(level, radius, 2)
    return image.astype(np.float32), labels


def _tubes(rng: np.random.Generator) -> Made:
    """Winding tubes of varying width."""
    image = 0.4 + 0.1 * smooth_noise(rng, 4)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for index in range(1, int(rng.integers(2, 7))):
        field = smooth_noise(rng, int(rng.integers(2, 6)))
        width = rng.uniform(0.03, 0.15)
        keep = smooth_noise(rng, 2) > rng.uniform(-1, 0)
        inside = (np.abs(field) < width) & keep
        image = image + rng.uniform(-0.3, 0.3) * ndimage.gaussian_filter(inside.astype(np.float32), 0.8)
        labels[inside] = index
    return image.astype(np.float32), labels


def _degrade(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    if rng.random() < 0.5:
        image = image * (1 + rng.uniform(0, 0.25) * smooth_noise(rng, 2))
    if rng.random() < 0.4:
        image = ndimage.gaussian_filter(image, rng.uniform(0.4, 1.8))
    if rng.random() < 0.7:
        noise = rng.standard_normal(image.shape).astype(np.float32)
        if rng.random() < 0.5:
            noise = ndimage.gaussian_filter(noise, 0.8) * 2
        image = image + rng.uniform(0.005, 0.06) * noise
    if rng.random() < 0.15:
        image = speckle(image, rng)
    return image


_MAKERS: tuple[tuple[Callable[[np.random.Generator], Made], float], ...] = (
    (_lesions, 4.0), (_organs, 4.0), (_partition, 1.5), (_chest, 2.0), (_teeth, 0.5), (_levels, 0.7),
    (_bumps, 2.5), (_tubes, 0.7), (faint, 3.0), (strips, 2.0), (rings, 1.2), (arches, 2.0), (cells, 1.5),
)  # fmt: skip
_OF_PARTS = (_teeth, arches, cells)
