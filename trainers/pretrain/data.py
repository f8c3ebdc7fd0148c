"""The labelled sets that may train weights which the project ships, split by patient.

Only what is named here is ever opened; nothing lists the data folder. Rows of mixed sets are taken by
the licence in their manifest.csv.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

FREE = ("CC BY 3.0", "CC BY 4.0", "CC0 1.0")
_VOLUMES = (
    # set, stem, held out for calibration
    ("ct_totalseg_examples", "ts_example_ct_full", False),
    ("ct_totalseg_examples", "ts_example_mr_sm", False),
    ("ct_totalseg_vessels", "ts_aorta_ct", False),
    ("ct_totalseg_vessels", "ts_pulmonary_ct", True),
    ("ctmr_sts_mass", "STS_001_CT", False),
    ("ctmr_sts_mass", "STS_001_MR_T1", False),
    ("ctmr_sts_mass", "STS_002_CT", True),
    ("ctmr_sts_mass", "STS_002_MR_T1", True),
)
_UNLABELLED = (
    "CT_AVM", "CT_pitch", "MR_Gd", "chris_PD", "ct_crlm_1004", "mr_adc_abdomen_scan001",
    "mr_t2_abdomen_scan001", "t1_head_datalad",
)  # fmt: skip
_CT_WINDOWS = ((40, 400), (40, 350), (60, 180), (-500, 1400), (300, 1500), (0, 2000), (100, 600))


@dataclass(frozen=True, kw_only=True)
class Item:
    """One slice.

    Args:
        image: (H, W) uint8.
        labels: (H, W) uint8, 0 = background; None where there are none.
        source: Name of the set.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None
    source: str


def held_out(set_name: str, patient: str) -> bool:
    """True for the fifth of the patients that never trains (by a checksum of the patient's name)."""
    return zlib.crc32(f"{set_name}/{patient}".encode()) % 5 == 0


def real_items(data: Path, rng: np.random.Generator, *, held: bool = False) -> Iterator[Item]:
    """Slices of the permitted sets.

    Args:
        data: Folder of the sets; sets that are missing are skipped.
        rng: Chooses slices and windows of volumes.
        held: False for the training patients, True for the held-out ones.
    """
    for set_name, patient_column in (
        ("cxr_lung_v7", "patientid"), ("mr_wholeheart_hvsmr2", "group"), ("multi_medscribble", "stem"),
    ):  # fmt: skip
        folder = data / set_name
        if not (folder / "manifest.csv").is_file():
            continue
        with (folder / "manifest.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if "license" in row and row["license"].strip() not in FREE:
                continue
            patient = row[patient_column]
            out = patient == "10002" if patient_column == "group" else held_out(set_name, patient)
            if out == held:
                yield Item(
                    image=_read_png(folder / "images" / f"{row['stem']}.png"),
                    labels=_read_png(folder / "labels" / f"{row['stem']}.png"),
                    source=set_name,
                )
    for set_name, stem, out in _VOLUMES:
        path = data / set_name / "images" / f"{stem}.nii.gz"
        if out == held and path.is_file():
            yield from _slices(path, data / set_name / "labels" / f"{stem}.nii.gz", set_name, rng, 45)
    for stem in _UNLABELLED if not held else ():
        path = data / "volumes_unlabelled" / f"{stem}.nii.gz"
        if path.is_file():
            yield from _slices(path, None, "volumes_unlabelled", rng, 24)


def _read_png(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("L"), np.uint8)


def _read_labels(path: Path) -> NDArray[np.uint8]:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj).astype(np.uint8)


def _slices(
    path: Path, label_path: Path | None, source: str, rng: np.random.Generator, count: int
) -> Iterator[Item]:
    header: Any = nib.load(path)
    volume = np.asarray(header.dataobj).astype(np.float32)
    labels = None if label_path is None else _read_labels(label_path)
    spacing = np.array(header.header.get_zooms()[:3])
    axes = [2] if spacing.max() > 1.6 * spacing.min() else [0, 1, 2]
    for _ in range(count):
        axis = int(rng.choice(axes))
        weight = np.ones(volume.shape[axis])
        if labels is not None:
            weight = (labels > 0).sum(tuple(a for a in range(3) if a != axis)) > 30
        else:
            weight[: len(weight) // 6] = weight[-(len(weight) // 6) :] = 0
        index = int(rng.choice(len(weight), p=weight / weight.sum()))
        image = _window(np.take(volume, [index], axis).squeeze(axis), volume, rng).T
        mask = None if labels is None else np.take(labels, [index], axis).squeeze(axis).T
        if max(image.shape) < 170:
            image = np.clip(ndimage.zoom(image, 2, order=1), 0, 1)
            mask = None if mask is None else mask.repeat(2, 0).repeat(2, 1)
        yield Item(
            image=np.ascontiguousarray(image * 255).astype(np.uint8),
            labels=None if mask is None else np.ascontiguousarray(mask),
            source=source,
        )


def _window(plane: np.ndarray, volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if volume.min() < -500:
        centre, width = _CT_WINDOWS[int(rng.integers(len(_CT_WINDOWS)))]
        half = 0.5 * width * rng.uniform(0.8, 1.25)
        low, high = centre - half, centre + half
    else:
        low, high = np.percentile(plane, [rng.uniform(0, 2), rng.uniform(97.5, 100)])
    out: np.ndarray = np.clip((plane - low) / max(high - low, 1e-3), 0, 1)
    return out
