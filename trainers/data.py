"""What trainings learn from: cases, and their slices at the model's resolution."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sam_infer.errors import InputError, UnavailableError
from sam_infer.intensity import Window
from sam_infer.volumes import Image, stem

logger = logging.getLogger(__name__)

ReadImage = Callable[[Path], Image]
WindowFor = Callable[[Image, Mapping[str, Any]], Window]


class Datastore(Protocol):
    """The part of MONAI Label's datastore that training reads, and where it keeps what it proposes."""

    def datalist(self) -> list[dict[str, Any]]:
        """The accepted cases: {"image": path, "label": path} each."""

    def get_unlabeled_images(self) -> list[str]:
        """Ids of the cases without an accepted label."""

    def get_image_uri(self, image_id: str) -> str:
        """The file of an image."""

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The file of a label; "" where there is none."""

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known of a label."""

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Keep a label under a tag; the one that it replaces goes to the history."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case to learn from.

    Args:
        case_id: The image file's name without extension.
        image: The image file.
        label: Its label map; None where it has none.
        slices: The slices that the label map speaks of; None = all.
    """

    case_id: str
    image: Path
    label: Path | None = None
    slices: tuple[int, ...] | None = None


def check_image_id(image_id: str) -> str:
    """The id of an image, which can be the name of a file or a folder.

    Raises:
        InputError: When it cannot.
    """
    if not image_id or Path(image_id).name != image_id or image_id.startswith(".") or "\0" in image_id:
        raise InputError("image", image_id, "send the id of an image")
    return image_id


def accepted_cases(datastore: Datastore) -> list[Case]:
    """All cases with an accepted (final) label, sorted by id."""
    cases = [
        Case(case_id=stem(entry["image"]), image=Path(entry["image"]), label=Path(entry["label"]))
        for entry in datastore.datalist()
    ]
    return sorted(cases, key=lambda case: case.case_id)


def unlabelled_cases(datastore: Datastore, names: Iterable[str]) -> list[Case]:
    """The images of some ids as cases without a label map; a remote store fetches them now.

    One that cannot be had is left out, with a warning.
    """
    cases = []
    for name in names:
        try:
            cases.append(Case(case_id=name, image=Path(datastore.get_image_uri(name))))
        except (InputError, UnavailableError) as error:
            logger.warning("Case %s is left out: %s", name, error)
    return cases


class SliceSource(Protocol):
    """Training slices, in memory or read when they are drawn."""

    @property
    def cases(self) -> NDArray[np.int64]:
        """(n,) int64, which case a slice comes from."""

    def __len__(self) -> int:
        """Number of slices."""

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images and labels, (m, S, S) uint8 each, as in `Slices`."""

    def present(self, classes: int) -> NDArray[np.bool_]:
        """(n, classes) bool, whether a slice holds a label."""


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Training slices in memory.

    Args:
        images: (n, S, S) uint8, windowed, 255 = the window's upper end.
        labels: (n, S, S) uint8, the network's channel: 0 background, then the labels in order.
        cases: (n,) int64, which case a slice comes from.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    cases: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images and labels of some slices."""
        return self.images[indices], self.labels[indices]

    def present(self, classes: int) -> NDArray[np.bool_]:
        """(n, classes) bool, whether a slice holds a label."""
        pixels = self.labels.reshape(len(self), -1)
        return np.stack([(pixels == c).any(axis=1) for c in range(1, classes + 1)], axis=1)


def sampling_weights(slices: SliceSource, *, classes: int) -> NDArray[np.float64]:
    """How often each slice is drawn, so that rare labels and small cases are not drowned.

    Every label that occurs at all, and "no label", get the same share; within a label every case gets the
    same share.

    Args:
        slices: The training slices.
        classes: Number of labels without background.

    Returns:
        (n,) float64 that sums to 1.
    """
    present = slices.present(classes)
    groups = [*present.T, ~present.any(axis=1)]
    weights = np.zeros(len(slices))
    for group in groups:
        if not group.any():
            continue
        per_case = np.bincount(slices.cases[group], minlength=int(slices.cases.max()) + 1)
        share = group / np.maximum(per_case[slices.cases], 1)
        weights += share / share.sum()
    return weights / weights.sum()
