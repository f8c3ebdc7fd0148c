"""Abdominal CT phantoms: labelled volumes from formulas, so that the loop can be seen without data.

A case is drawn back to front on one voxel grid (`trainers.phantom_organs`): a body outline with skin, fat
and a muscle wall, then spine, ribs, lungs, bowel, vessels and the labelled organs, each as a signed distance
that is mixed into the Hounsfield units over about one voxel (`trainers.phantom_scene`). Smooth random fields
bend all of them, so no two cases share a shape.

These are drawings, good for trying the software and its tests. They say nothing about how well a model
does on patients.

Run ``python -m trainers.phantoms DIR --count 12 --seed 0`` to write a folder of cases.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.files import write_atomic
from trainers.phantom_organs import LABELS, draw_anatomy
from trainers.phantom_scene import Patient, Scene

__all__ = ["LABELS", "main", "make_phantom", "write_phantoms"]


def make_phantom(
    seed: int, shape: tuple[int, int, int] = (160, 160, 48)
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.float64]]:
    """One labelled abdominal CT volume, the same for the same seed.

    Args:
        seed: Chooses the patient: habitus, organ shapes, contrast phase, lesions, noise.
        shape: (I, J, K) in voxels, at least (48, 48, 16); the field of view does not depend on it.

    Returns:
        image: (I, J, K) int16 in HU; i runs from the patient's right to the left, j from front to back,
            k from feet to head.
        label: (I, J, K) uint8 with the values of `LABELS`, 0 = background.
        affine: (4, 4) float64, voxel ijk to RAS mm.
    """
    if len(shape) != 3 or shape[0] < 48 or shape[1] < 48 or shape[2] < 16:
        raise ValueError(f"shape must be (I, J, K) of at least (48, 48, 16), got {shape}")
    rng = np.random.default_rng([seed, 1])
    patient = Patient.draw(rng)
    scene = Scene(shape, patient, rng)
    draw_anatomy(scene)
    return _scan(scene), scene.label, _affine(scene, rng)


def write_phantoms(
    folder: Path,
    *,
    count: int = 12,
    seed: int = 0,
    shape: tuple[int, int, int] = (160, 160, 48),
) -> None:
    """Writes ``phantom_000.nii.gz`` and so on, with the ground truth in the sub-folder ``truth``.

    Every file appears whole or not at all. Cases of which both files are there already are left as they
    are; a case does not depend on ``count``.

    Args:
        folder: Created where it does not exist. Images go here as int16 HU, labels to ``folder/truth``
            under the same names as uint8 with the values of `LABELS`.
        count: Number of cases.
        seed: Another seed gives other patients.
        shape: (I, J, K) in voxels.
    """
    folder = Path(folder)
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        name = f"phantom_{index:03d}.nii.gz"
        if (folder / name).exists() and (folder / "truth" / name).exists():
            continue
        image, label, affine = make_phantom(seed * 100_003 + index, shape)
        _save(folder / "truth" / name, label, affine)
        _save(folder / name, image, affine)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: writes a folder of phantoms."""
    parser = argparse.ArgumentParser(prog="python -m trainers.phantoms", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the images go; labels go to its folder truth")
    parser.add_argument("--count", type=int, default=12, help="number of cases (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients")
    args = parser.parse_args(argv)
    write_phantoms(args.folder, count=args.count, seed=args.seed)
    print(f"{args.count} phantoms in {args.folder}, ground truth in {args.folder / 'truth'}")


def _scan(scene: Scene) -> NDArray[np.int16]:
    """What a scanner makes of the drawing: blur, noise with the texture of reconstruction, rounding."""
    rng, (rows, columns, _) = scene.rng, scene.shape
    blurred = scene.hu
    for axis, sigma in enumerate((0.5, 0.5, 0.35)):
        blurred = ndimage.gaussian_filter1d(blurred, sigma, axis)
    fi, fj = np.fft.fftfreq(rows)[:, None, None], np.fft.rfftfreq(columns)[None, :, None]
    frequency = np.sqrt(fi * fi + fj * fj)
    power = np.sqrt(frequency + 0.02) * np.exp(-((frequency / 0.38) ** 2))  # ramp filter, apodised
    white = rng.normal(0, 1, scene.shape).astype(np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white, axes=(0, 1)) * power, (rows, columns), axes=(0, 1))
    noise *= scene.patient.noise / noise.std()
    depth = np.exp(-(scene.plain[0] ** 2 + scene.plain[1] ** 2) / (2 * 120.0**2))
    noise *= (0.8 + 0.3 * depth) * np.where(blurred < -700, 0.6, 1.0)
    return np.clip(np.rint(blurred + noise), -1024, 3071).astype(np.int16)


def _affine(scene: Scene, rng: np.random.Generator) -> NDArray[np.float64]:
    """Voxel ijk (right to left, front to back, feet to head) to RAS mm, the table anywhere."""
    si, sj, sk = scene.spacing
    affine = np.diag([-si, -sj, sk, 1.0])
    affine[:3, 3] = (
        (scene.shape[0] - 1) / 2 * si + rng.uniform(-8, 8),
        (scene.shape[1] - 1) / 2 * sj + rng.uniform(100, 160),
        rng.uniform(-900, -300),
    )
    return affine


def _save(path: Path, data: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    write_atomic(path, igzip.compress(image.to_bytes(), 1))


if __name__ == "__main__":
    main()
