"""The canvas of a phantom: patient coordinates, shapes as signed distances, and how tissues are mixed.

Coordinates are patient millimetres: x to the patient's left, y to the back, z to the head, the origin at the
centre of the lowest slice. Distances are negative inside a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEIGHT_MM = 240.0
FAR = 1e3

Array = NDArray[np.float32]
Box3 = tuple[slice, slice, slice]
Vec3 = tuple[float, float, float]
WHOLE: Box3 = (slice(None), slice(None), slice(None))


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What differs from patient to patient; lengths in mm, densities in HU."""

    rx: float
    ry: float
    fat: float
    wall: float
    enhancement: float
    noise: float
    shift: Vec3
    scale: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        """A random patient."""
        habitus = rng.beta(2, 3)
        return cls(
            rx=140 + 34 * habitus + rng.uniform(-5, 5),
            ry=112 + 36 * habitus + rng.uniform(-4, 4),
            fat=8 + 26 * habitus,
            wall=rng.uniform(9, 13),
            enhancement=rng.uniform(0.45, 0.6) if rng.random() < 0.2 else rng.uniform(0.85, 1.1),
            noise=rng.uniform(12, 18),
            shift=(rng.uniform(-5, 5), rng.uniform(-4, 4), rng.uniform(-8, 8)),
            scale=rng.uniform(0.94, 1.04),
        )

    def hu(self, plain: float, gain: float) -> float:
        """Density of a tissue: unenhanced value plus its uptake in the portal venous phase."""
        return plain + self.enhancement * gain


class Scene:
    """The canvas: HU, labels and bent patient coordinates of every voxel."""

    def __init__(self, shape: tuple[int, int, int], patient: Patient, rng: np.random.Generator) -> None:
        self.shape, self.patient, self.rng = shape, patient, rng
        field = 2 * max(patient.rx, patient.ry) + 20
        self.spacing = np.array([field / shape[0], field / shape[1], HEIGHT_MM / shape[2]])
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape[:2], self.spacing[:2], strict=True)]
        axes.append((np.arange(shape[2]) + 0.5) * self.spacing[2])
        self.axes = [a.astype(np.float32) for a in axes]
        self.plain = [a.reshape([-1 if i == n else 1 for i in range(3)]) for n, a in enumerate(self.axes)]
        organ = [
            (a - s) / patient.scale + self.field(amplitude, (5, 5, 4))
            for a, s, amplitude in zip(self.plain, patient.shift, (5, 5, 7), strict=True)
        ]
        self.organ: list[Array] = [np.ascontiguousarray(a, np.float32) for a in organ]
        self.hu: Array = np.full(shape, -1000, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.cavity: Array = np.full(shape, -FAR, np.float32)
        self.fascia: Array = self.cavity
        self.wall: Array = self.cavity
        self.back = 0.0
        self.fat_hu = rng.uniform(-112, -98)

    def field(self, amplitude: float, knots: tuple[int, int, int], box: Box3 | None = None) -> Array:
        """A smooth random field over the grid: mean 0, standard deviation about ``amplitude``."""
        out = self.rng.normal(0, 1.6 * amplitude, knots).astype(np.float32)
        for axis, (n, k) in enumerate(zip(self.shape, knots, strict=True)):
            at = np.linspace(0, k - 1, n)[:, None] - np.arange(k)
            basis = np.exp(-((at / 0.75) ** 2))
            basis = (basis / basis.sum(1, keepdims=True)).astype(np.float32)
            basis = basis if box is None else basis[box[axis]]
            out = np.moveaxis(np.tensordot(basis, out, (1, axis)), 0, axis)
        return np.ascontiguousarray(out)

    def box(self, centre: Sequence[float], radii: Sequence[float], pad: float = 24.0) -> Box3:
        """The part of the grid that a bent shape of these half lengths (mm) can reach."""
        slices = []
        for axis, shift, c, r in zip(self.axes, self.patient.shift, centre, radii, strict=True):
            middle = c * self.patient.scale + shift
            low, high = np.searchsorted(axis, [middle - r - pad, middle + r + pad])
            slices.append(slice(int(low), int(max(high, low + 1))))
        return slices[0], slices[1], slices[2]

    def at(self, box: Box3) -> tuple[Array, Array, Array]:
        """Bent coordinates x, y, z (mm) of the voxels of ``box``."""
        x, y, z = (a[box] for a in self.organ)
        return x, y, z

    def ellipsoid(
        self, centre: Vec3, radii: Vec3, *, box: Box3 | None = None, turn: float = 0.0, rough: float = 0.0
    ) -> tuple[Box3, Array]:
        """Where an ellipsoid can be, and the distance (mm) to it there.

        ``turn`` rotates it in the axial plane (radians), ``rough`` is the size (mm) of its dents.
        """
        if box is None:
            reach = max(radii[:2]) if turn else None
            box = self.box(centre, (reach or radii[0], reach or radii[1], radii[2]))
        x, y, z = (a - c for a, c in zip(self.at(box), centre, strict=True))
        if turn:
            x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        u, v, w = (a / np.float32(r) for a, r in zip((x, y, z), radii, strict=True))
        near = np.sqrt(u * u + v * v + w * w) + np.float32(1e-4)
        u, v, w = (a / np.float32(r) for a, r in zip((u, v, w), radii, strict=True))
        distance = near * (near - 1) / (np.sqrt(u * u + v * v + w * w) + np.float32(1e-4))
        if rough:
            distance += self.field(rough, (11, 11, 7), box)
        return box, distance

    def tube(self, start: Vec3, end: Vec3, radius: float) -> tuple[Box3, Array]:
        """Where a straight vessel can be, and the distance (mm) to its wall there."""
        a, b = np.array(start), np.array(end)
        box = self.box((a + b) / 2, np.abs(b - a) / 2 + radius)
        x, y, z = self.at(box)
        direction = (b - a).astype(np.float32)
        t = (x - a[0]) * direction[0] + (y - a[1]) * direction[1] + (z - a[2]) * direction[2]
        t = np.clip(t / (direction @ direction), 0, 1).astype(np.float32)
        gaps = (x - a[0] - t * direction[0], y - a[1] - t * direction[1], z - a[2] - t * direction[2])
        return box, np.sqrt(sum(g.astype(np.float32) ** 2 for g in gaps)) - np.float32(radius)

    def paint(
        self,
        box: Box3,
        distance: Array,
        hu: float | Array,
        *,
        label: int | None = 0,
        edge: float | None = None,
        gap: float = 0.0,
        inside: bool = True,
    ) -> None:
        """Mixes a tissue into the image where ``distance`` is negative.

        ``edge`` is the width (mm) of its border, one voxel by default; ``gap`` puts fat of this thickness
        around it; ``inside`` clips it to the abdominal cavity; a label of None keeps the labels.
        """
        if inside:
            distance = np.maximum(distance, self.cavity[box] + 1.0)
        if gap:
            rim = np.maximum(distance - gap, self.cavity[box])
            self.paint(box, rim, self.fat_hu, inside=False)
        alpha = np.clip(0.5 - distance / np.float32(edge or self.spacing[0]), 0, 1)
        self.hu[box] += alpha * (hu - self.hu[box])
        if label is not None:
            self.label[box][distance < 0] = label
