"""Images made by code in which a small model fails: outlines half gone, strips, rings, many parts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import ndimage

from sam_infer.types import FloatArray
from trainers.pretrain.shapes import SIDE, Made, Plane, blob, smooth_noise, soft_edge, speckle


def ground(rng: np.random.Generator) -> FloatArray:
    """(S, S) float32: shading, coarse and fine texture and, at times, layers."""
    image = rng.uniform(0.3, 0.6) + rng.uniform(0.02, 0.1) * smooth_noise(rng, int(rng.integers(2, 6)))
    image = image + rng.uniform(0, 0.07) * smooth_noise(rng, int(rng.integers(8, 30)))
    if rng.random() < 0.4:
        rows = ndimage.gaussian_filter1d(rng.standard_normal(2 * SIDE), rng.uniform(2, 12))
        shift = np.arange(SIDE)[:, None] + SIDE / 2 + rng.uniform(5, 20) * smooth_noise(rng, 3)
        layers = rows[np.clip(shift, 0, 2 * SIDE - 1).astype(np.int64)]
        image = image + rng.uniform(0.02, 0.12) * layers / (rows.std() + 1e-6)
    return np.asarray(image, np.float32)


def faint(rng: np.random.Generator) -> Made:
    """Blobs of their ground's own grey: told by grain, a partial outline, a slight step."""
    image = ground(rng)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for index in range(1, int(rng.integers(2, 5))):
        plane = Plane(rng, float(rng.uniform(0.1, 1.2)))
        level, radius = blob(plane, rng, 10, 60)
        soft = soft_edge(level, radius, rng.uniform(1, 14))
        seen = np.clip(0.5 + rng.uniform(0.2, 0.9) * smooth_noise(rng, 2), 0, 1.4)  # where the edge shows
        grain = smooth_noise(rng, int(rng.integers(10, 70)))
        image = image + soft * seen * rng.choice([-1, -1, 1]) * rng.uniform(0.03, 0.22)
        image = image * (1 - soft * rng.uniform(0, 0.6)) + soft * rng.uniform(0, 0.6) * image.mean()
        image = image + soft * rng.uniform(0, 0.06) * grain
        if rng.random() < 0.5:
            rim = np.exp(-((level * radius / rng.uniform(1.2, 5)) ** 2))
            image = image + rng.uniform(-0.15, 0.2) * seen * rim
        labels[level > 0] = index
    for _ in range(int(rng.integers(0, 4))):  # what resembles an object and is none
        level, radius = blob(Plane(rng, 0.8), rng, 4, 30)
        step = rng.uniform(-0.15, 0.1) * (labels == 0)
        image = image + soft_edge(level, radius, float(rng.uniform(3, 15))) * step
    if rng.random() < 0.5:
        image = speckle(image, rng)
    return image.astype(np.float32), labels


def strips(rng: np.random.Generator) -> Made:
    """Bent bands of varying width and low contrast beside rounder neighbours."""
    image = ground(rng)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    spread = rng.uniform(0.04, 0.2)
    for _ in range(int(rng.integers(2, 9))):
        level, radius = blob(Plane(rng, 0.8), rng, 12, 60)
        soft = soft_edge(level, radius, rng.uniform(1, 5))
        image = _painted(image, soft, rng.normal(0.5, spread) + 0.03 * smooth_noise(rng, 30))
    plane = Plane(rng, rng.uniform(0.1, 1.0))
    for index in range(1, int(rng.integers(2, 6))):
        far, along = _from_curve(plane, rng.uniform(0.08 * SIDE, 0.92 * SIDE, (3, 2)))
        thick = float(np.exp(rng.uniform(np.log(2.5), np.log(22))))
        bulge = 1 + rng.uniform(0, 0.5) * np.sin(along * rng.uniform(2, 12) + rng.uniform(0, 6))
        level = np.asarray(1 - far / (thick * bulge), np.float32)
        soft = soft_edge(level, thick, rng.uniform(0.5, min(thick, 6)))
        texture = rng.uniform(0, 0.05) * smooth_noise(rng, int(rng.integers(12, 60)))
        image = _painted(image, soft, rng.normal(0.5, spread) + texture)
        labels[level > 0] = index
    return image.astype(np.float32), labels


def rings(rng: np.random.Generator) -> Made:
    """Walls around cavities, whole or cut open; the wall and the cavity are an object each."""
    image = ground(rng)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for index in range(1, 2 * int(rng.integers(1, 4)), 2):
        plane = Plane(rng, rng.uniform(0.1, 0.8))
        level, radius = blob(plane, rng, 18, 75)
        share = rng.uniform(0.12, 0.5)
        outer = soft_edge(level, radius, rng.uniform(0.5, 5))
        inner = soft_edge(level - share, radius, rng.uniform(0.5, 5))
        wall = level > 0
        if rng.random() < 0.35:
            y, x = np.nonzero(level > 0)
            angle = np.arctan2(plane.y - y.mean(), plane.x - x.mean()) if len(x) else plane.x
            wall = wall & (np.cos(angle - rng.uniform(0, 6.3)) < rng.uniform(0.2, 0.9))
            outer = outer * ndimage.gaussian_filter(wall.astype(np.float32), 1)
        bright, dark = rng.normal(0.5, 0.15, 2)
        image = _painted(image, outer, bright + 0.03 * smooth_noise(rng, 40))
        image = _painted(image, inner, dark + 0.03 * smooth_noise(rng, 20))
        labels[wall & (level <= share)] = index
        labels[level > share] = index + 1
    return image.astype(np.float32), labels


def arches(rng: np.random.Generator) -> Made:
    """Two bowed rows of touching teeth: bright crowns, fading roots, canals, fillings; a label each."""
    plane = Plane(rng, rng.uniform(0.05, 0.3))
    image = ground(rng) * rng.uniform(0.5, 0.9) + 0.1
    labels = np.zeros((SIDE, SIDE), np.uint8)
    bow, gap, size = rng.uniform(-30, 30), rng.uniform(-2, 12), rng.uniform(0.6, 1.5)
    middle, contrast = SIDE / 2 + rng.normal(0, 15), rng.uniform(0.08, 0.3)
    index = 0
    for row in (-1, 1):
        x, last = rng.uniform(2, 40), SIDE - rng.uniform(2, 40)
        while x < last and index < 60:
            width, length = size * rng.uniform(6, 12), size * rng.uniform(20, 34)
            if rng.random() < 0.1:  # a missing tooth
                x += 2 * width
                continue
            tip = middle + bow * ((x - SIDE / 2) / (SIDE / 2)) ** 2 + row * gap / 2
            down = (row * (plane.y - tip)) / (2 * length)  # 0 at the biting edge, 1 at the root's tip
            lean = rng.normal(0, 0.15) * 2 * length * down
            taper = 1 - rng.uniform(0.3, 0.7) * np.clip(down, 0, 1) ** 1.5
            side = np.abs(plane.x - x - width - lean) / (width * np.maximum(taper, 0.05))
            level = np.asarray(1 - (side**4 + np.abs(2 * down - 1) ** 4) ** 0.25, np.float32)
            soft = soft_edge(level, width, rng.uniform(0.5, 3))
            fade = 1 - rng.uniform(0.2, 0.75) * np.clip(down, 0, 1)
            image = image * (1 - 0.7 * soft) + 0.7 * soft * (image.mean() + contrast * fade)
            if rng.random() < 0.7:
                image = image - soft * 0.1 * np.exp(-((side / 0.15) ** 2)) * (down > 0.25)
            if rng.random() < 0.2:
                image = image + 0.4 * soft * (down < rng.uniform(0.1, 0.3))
            index += 1
            labels[level > 0] = index
            x += 2 * width + rng.uniform(-2, 3)
    return image.astype(np.float32), labels


def cells(rng: np.random.Generator) -> Made:
    """Many alike things among some that are different; only the alike are labelled."""
    image = ground(rng)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    plane = Plane(rng, rng.uniform(0.1, 0.9))
    size, grey = rng.uniform(6, 26), rng.choice([-1, 1]) * rng.uniform(0.08, 0.35)
    rim, edge = rng.uniform(-0.2, 0.2), rng.uniform(0.5, 4)
    for index in range(1, int(rng.integers(3, 26 if size < 14 else 10))):
        radius = size * rng.uniform(0.8, 1.25)
        at = rng.uniform(0, SIDE, 2)
        level = plane.ellipse(at[0], at[1], radius, radius * rng.uniform(0.75, 1.3), rng.uniform(0, 3.1))
        image = image + soft_edge(level, radius, edge) * grey * rng.uniform(0.8, 1.2)
        image = image + rim * np.exp(-((level * radius / 2) ** 2))
        labels[level > 0] = index
    for _ in range(int(rng.integers(0, 4))):
        level, radius = blob(plane, rng, 8, 40)
        soft = soft_edge(level, radius, 2) * (labels == 0)
        image = image - np.sign(grey) * rng.uniform(0.05, 0.3) * soft
    return image.astype(np.float32), labels


def _painted(image: FloatArray, share: FloatArray, colour: FloatArray) -> FloatArray:
    return np.asarray(image * (1 - share) + share * colour, np.float32)


def _from_curve(plane: Plane, knots: np.ndarray) -> tuple[FloatArray, FloatArray]:
    """(S, S) float32 each: distance in pixels to a quadratic Bezier curve and its parameter there, 0..1."""
    far = np.full((SIDE, SIDE), np.inf, np.float32)
    along = np.zeros((SIDE, SIDE), np.float32)
    t = np.linspace(0, 1, 11)[:, None]
    line = (1 - t) ** 2 * knots[0] + 2 * t * (1 - t) * knots[1] + t**2 * knots[2]
    for number, (start, end) in enumerate(pairwise(line.astype(np.float32))):
        step = end - start
        x, y = plane.x - start[0], plane.y - start[1]
        place = np.clip((x * step[0] + y * step[1]) / max(float(step @ step), 1e-6), 0, 1)
        squared = (x - place * step[0]) ** 2 + (y - place * step[1]) ** 2
        nearer = squared < far
        far[nearer], along[nearer] = squared[nearer], (number + place[nearer]) / 10
    return np.sqrt(far), along
