"""A labelled set of pictures: reading it, and what each known set is measured with by default."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.errors import InputError
from sam_infer.geometry import slice_image
from sam_infer.intensity import Window, choose_window
from sam_infer.volumes import Image, read_image, read_labelmap

LabelImage = NDArray[np.uint8]
#: Columns of a manifest that name what must stay on one side of a split, the first that is there counts.
_GROUP_COLUMNS = ("group", "patientid", "patient")
_UPPER, _LOWER = (range(10, 30, 10), range(30, 50, 10))


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a set is measured with where the command says nothing else: this project's own choices.

    Args:
        names: Label value to name; values that are not named are called by their number.
        labelled: Numbers of labelled images.
        size: Longest side in pixels of what the U-Nets see.
        iterations: Optimiser steps of each training.
        batch: Images per step.
        ablated: Numbers of labelled images at which the rows of ablations are run; () = all, as where none of
            these is asked for.
        sided: Values of labels of paired organs, see `sides_of`.
        turned: Whether its pictures are stored turned by half a circle; they are turned back when read.
        strategies: Prompt strategies whose labels train a U-Net; () = all of `bench.papers.hakkinen.TRAINED`.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    labelled: tuple[int, ...] = (5, 10, 20)
    size: int = 96
    iterations: int = 600
    batch: int = 4
    ablated: tuple[int, ...] = ()
    sided: tuple[int, ...] = ()
    turned: bool = False
    strategies: tuple[str, ...] = ()


_TEETH = [quadrant + tooth for quadrant in (*_UPPER, *_LOWER) for tooth in range(1, 9)]
KNOWN: Mapping[str, Defaults] = {
    "ct_abdomen_curvas": Defaults(names={1: "pancreas", 2: "kidney", 3: "liver"}, sided=(2,), ablated=(10,)),
    "ct_liver_ircad": Defaults(names={1: "liver"}, turned=True),
    "xray_dental_ufba425": Defaults(
        names={value: f"tooth {number}" for value, number in enumerate(_TEETH, start=1)},
        ablated=(10,),
    ),
    "us_breast_busi": Defaults(names={1: "lesion"}, labelled=(10, 20, 40)),
    "cxr_lung_v7": Defaults(names={1: "lung"}, sided=(1,)),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture and its truth.

    Args:
        name: File name without extension.
        group: Patient or volume; pictures of one group never lie on both sides of the test split.
        image: The picture, as every other part of the project reads it.
        truth: (H, W) uint8 label values; of a pool image it is only ever used to judge pseudo labels, or by
            rows whose name says so.
        digest: Hash of both files' content.
    """

    name: str
    group: str
    image: Image
    truth: LabelImage
    digest: str

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.truth.shape
        return height, width

    @property
    def window(self) -> Window:
        """How the picture's values become 0..1: 8-bit pictures as they are."""
        return choose_window(self.image.array)

    @property
    def present(self) -> frozenset[int]:
        """The label values that occur."""
        return frozenset(np.unique(self.truth[self.truth > 0]).tolist())


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """A labelled set in memory.

    Args:
        name: Of its folder.
        labels: Label name to value.
        samples: Sorted by name.
        defaults: See `Defaults`.
    """

    name: str
    labels: Mapping[str, int]
    samples: tuple[Sample, ...]
    defaults: Defaults


def find_set(given: str) -> Path:
    """The folder of a set: a path, or a name beside the checkout (`SAMLOOP_DATA` names another place)."""
    beside = Path(os.environ.get("SAMLOOP_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    for folder in (Path(given), beside / given):
        if (folder / "images").is_dir() and (folder / "labels").is_dir():
            return folder
    raise InputError("data", given, f"name a folder that holds images/ and labels/, or a set in {beside}")


def read_set(folder: Path, *, limit: int | None = None, sided: bool = False) -> LabelledSet:
    """Read a folder of images/*.png, labels/*.png of the same names and, where there is one, manifest.csv.

    Args:
        folder: See `find_set`.
        limit: Read at most so many images, evenly spaced by name.
        sided: Make two labels of each in `Defaults.sided`.
    """
    names = sorted(path.stem for path in (folder / "images").glob("*.png"))
    if limit is not None and len(names) > limit:
        names = [names[i] for i in np.linspace(0, len(names) - 1, limit).round().astype(int)]
    groups = _groups(folder)
    samples = tuple(_read(folder, name, groups.get(name, name)) for name in names)
    defaults = KNOWN.get(folder.name, Defaults())
    if defaults.turned:
        samples = tuple(turned(sample) for sample in samples)
    called = dict(defaults.names)
    for value in defaults.sided if sided else ():
        other = max(called) + 1
        samples = tuple(replace(s, truth=sides_of(s.truth, value, other)) for s in samples)
        called |= {value: f"{called[value]}, left in image", other: f"{called[value]}, right in image"}
    values = sorted(set().union(*(sample.present for sample in samples)))
    if not values:
        raise InputError("data", str(folder), "its label maps must hold at least one label")
    labels = {called.get(value, str(value)): value for value in values}
    return LabelledSet(name=folder.name, labels=labels, samples=samples, defaults=defaults)


def sides_of(truth: LabelImage, value: int, other: int) -> LabelImage:
    """Two labels of one that a pair of organs shares.

    A method that keeps one part of each label cannot find both organs of a pair, so each must have its own.

    Args:
        truth: (H, W) uint8 label values.
        value: The label; its parts whose centre lies in the left half of the image keep it.
        other: What the others get.
    """
    parts, count = ndimage.label(truth == value, np.ones((3, 3)))
    out = truth.copy()
    for part in range(1, count + 1):
        if np.nonzero(parts == part)[1].mean() >= truth.shape[1] / 2:
            out[parts == part] = other
    return out


def turned(sample: Sample) -> Sample:
    """A picture and its truth, turned by half a circle."""
    image = sample.image
    array = np.ascontiguousarray(image.array[::-1, ::-1])
    return replace(
        sample,
        image=replace(image, array=array, key=(*image.key, "turned")),
        truth=np.ascontiguousarray(sample.truth[::-1, ::-1]),
    )


def _groups(folder: Path) -> dict[str, str]:
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        return {}
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = next((c for c in _GROUP_COLUMNS if rows and c in rows[0]), "stem")
    return {row["stem"]: row[column] or row["stem"] for row in rows}


def _read(folder: Path, name: str, group: str) -> Sample:
    files = [folder / part / f"{name}.png" for part in ("images", "labels")]
    image = read_image(files[0])
    truth = np.ascontiguousarray(slice_image(read_labelmap(files[1], image), 0)).astype(np.uint8)
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files))
    return Sample(name=name, group=group, image=image, truth=truth, digest=digest.hexdigest())
