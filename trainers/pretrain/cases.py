"""Labelled objects for measuring a promptable engine, set by set."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sam_infer.geometry import largest_component
from sam_infer.types import BoolArray, FloatArray
from trainers.pretrain.data import FREE, real_items
from trainers.pretrain.synthetic import make_image

BENCHMARK, HELD_OUT, MADE = "benchmark", "held-out patients", "made images"
_MIN_PIXELS = 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """One object on one slice.

    Args:
        name: Row of the table.
        group: `BENCHMARK` (a set that never trains) or `HELD_OUT` (patients kept out of a set that does)
            or `MADE` (images made by code, of seeds that no pool uses).
        image: (H, W) float32 in 0..1.
        truth: (H, W) bool.
    """

    name: str
    group: str
    image: FloatArray
    truth: BoolArray


@dataclass(frozen=True, kw_only=True)
class _Slices:
    """Objects of one class of a folder of PNG: the largest part of it, or all parts as one."""

    name: str
    folder: str
    label: int | None
    whole: bool
    licence: str = ""


_PNG = (
    _Slices(name="breast lesion, US", folder="us_breast_busi", label=1, whole=False),
    _Slices(name="lungs, X-ray", folder="cxr_lung_v7", label=1, whole=True, licence="not free"),
    _Slices(name="one tooth, X-ray", folder="xray_dental_ufba425", label=-1, whole=False),
    _Slices(name="all teeth, X-ray", folder="xray_dental_ufba425", label=None, whole=True),
    _Slices(name="pancreas, CT", folder="ct_abdomen_curvas", label=1, whole=False),
    _Slices(name="kidney, CT", folder="ct_abdomen_curvas", label=2, whole=False),
    _Slices(name="liver, CT", folder="ct_abdomen_curvas", label=3, whole=False),
    _Slices(name="liver, CT, other source", folder="ct_liver_ircad", label=1, whole=False),
    _Slices(name="mixed tasks", folder="multi_medscribble", label=1, whole=True, licence="not free"),
)


def benchmark_cases(data: Path, per_set: int, seed: int) -> Iterator[Case]:
    """Objects of sets and rows that never train; sets that are missing are skipped.

    Args:
        data: Folder of the sets.
        per_set: At most so many objects a row of the table.
        seed: Of the choice.
    """
    for row, slices in enumerate(_PNG):
        rng = np.random.default_rng([seed, row])
        yield from _first(_png_cases(data, slices, rng), per_set)
    yield from _first(_atrium_cases(data, np.random.default_rng([seed, 99]), per_set), per_set)


def held_out_cases(data: Path, per_set: int, seed: int) -> Iterator[Case]:
    """Objects of held-out patients of the sets that train."""
    rng = np.random.default_rng([seed, 5])
    by_set: dict[str, list[Case]] = {}
    for item in real_items(data, rng, held=True):
        assert item.labels is not None
        present = [int(v) for v in np.unique(item.labels[item.labels > 0])]
        label = int(rng.choice(present)) if present else 0
        truth = item.labels == label
        if label and truth.sum() >= _MIN_PIXELS:
            case = Case(name=item.source, group=HELD_OUT, image=_unit(item.image), truth=truth)
            by_set.setdefault(item.source, []).append(case)
    for cases in by_set.values():
        rng.shuffle(cases)  # type: ignore[arg-type]
        yield from cases[:per_set]


def made_cases(count: int, seed: int) -> Iterator[Case]:
    """Objects of images made by code; none of these images is in a pool."""
    for number in range(count):
        rng = np.random.default_rng([seed, 6, number])
        image, labels, _ = make_image(rng)
        sizes = np.bincount(labels.ravel(), minlength=2)
        sizes[0] = 0
        good = np.flatnonzero((sizes >= 2 * _MIN_PIXELS) & (sizes < 0.5 * labels.size))
        if len(good):
            yield Case(name=MADE, group=MADE, image=_unit(image), truth=labels == rng.choice(good))


def _png_cases(data: Path, slices: _Slices, rng: np.random.Generator) -> Iterator[Case]:
    folder = data / slices.folder
    if not (folder / "manifest.csv").is_file():
        return
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if slices.licence:
        rows = [row for row in rows if row["license"].strip() not in FREE]
        used = _free_patients(folder)
        rows = [row for row in rows if row.get("patientid", row["stem"]) not in used]
    for number in rng.permutation(len(rows)):
        stem = rows[number]["stem"]
        labels = np.asarray(Image.open(folder / "labels" / f"{stem}.png").convert("L"))
        truth = _object(labels, slices, rng)
        if truth is not None and truth.sum() >= _MIN_PIXELS:
            image = np.asarray(Image.open(folder / "images" / f"{stem}.png").convert("L"))
            yield Case(name=slices.name, group=BENCHMARK, image=_unit(image), truth=truth)


def _free_patients(folder: Path) -> set[str]:
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {r.get("patientid", r["stem"]) for r in rows if r["license"].strip() in FREE}


def _object(labels: NDArray[np.uint8], slices: _Slices, rng: np.random.Generator) -> BoolArray | None:
    if slices.label is None:
        return labels > 0
    label = slices.label
    if label < 0:
        present = np.unique(labels[labels > 0])
        if not len(present):
            return None
        label = int(rng.choice(present))
    mask: BoolArray = labels == label
    return mask if slices.whole else largest_component(mask)


def _atrium_cases(data: Path, rng: np.random.Generator, wanted: int) -> Iterator[Case]:
    folder = data / "mr_left_atrium_la2018"
    if not (folder / "manifest.csv").is_file():
        return
    with (folder / "manifest.csv").open(newline="") as file:
        stems = sorted(row["stem"] for row in csv.DictReader(file))
    for stem in stems:
        image = _read_volume(folder / "images" / f"{stem}.nii.gz")
        labels = _read_volume(folder / "labels" / f"{stem}.nii.gz")
        good = np.flatnonzero((labels > 0).sum((0, 1)) >= 4 * _MIN_PIXELS)
        for index in rng.choice(good, min(-(-wanted // len(stems)), len(good)), replace=False):
            plane = image[:, :, index].T
            low, high = np.percentile(plane, [0.5, 99.5])
            truth = largest_component(labels[:, :, index].T > 0)
            grey = np.clip((plane - low) / max(high - low, 1e-3), 0, 1).astype(np.float32)
            yield Case(name="left atrium, MR", group=BENCHMARK, image=grey, truth=truth)


def _read_volume(path: Path) -> FloatArray:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj, np.float32)


def _first(cases: Iterator[Case], count: int) -> Iterator[Case]:
    yield from itertools.islice(cases, count)


def _unit(image: NDArray[np.uint8]) -> FloatArray:
    return image.astype(np.float32) / 255
