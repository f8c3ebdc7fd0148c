"""From accepted cases to training slices.

Prepared slices are kept small on disk, so that a round does not read and window every volume again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from sam_infer.files import write_atomic
from sam_infer.geometry import slice_image
from sam_infer.intensity import Window
from sam_infer.networks.unet import to_square, windowed_slices
from sam_infer.volumes import Image, file_key, read_image, read_labelmap, stem

#: Slices kept of one case, at most.
SLICES_PER_CASE = 48
#: Share of those that hold no label, where the case has such slices.
EMPTY_SHARE = 0.25
_VERSION = "slices/1"

ReadImage = Callable[[Path], Image]
WindowFor = Callable[[Image, Mapping[str, Any]], Window]


class Datastore(Protocol):
    """The part of MONAI Label's datastore that training reads."""

    def datalist(self) -> list[dict[str, Any]]:
        """The accepted cases: {"image": path, "label": path} each."""

    def get_unlabeled_images(self) -> list[str]:
        """Ids of the cases without an accepted label."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An accepted case.

    Args:
        case_id: The image file's name without extension.
        image: The image file.
        label: The accepted label map.
    """

    case_id: str
    image: Path
    label: Path


def accepted_cases(datastore: Datastore) -> list[Case]:
    """All cases with an accepted (final) label, sorted by id."""
    cases = [
        Case(case_id=stem(entry["image"]), image=Path(entry["image"]), label=Path(entry["label"]))
        for entry in datastore.datalist()
    ]
    return sorted(cases, key=lambda case: case.case_id)


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Training slices at the model's resolution.

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


@dataclass(frozen=True, kw_only=True)
class SliceStore:
    """Reads cases as slices, through a folder of prepared ones.

    An entry's name is a hash of the identity (path, time, size) of both files, the window, the labels and
    the size: a file that changed never meets an old entry.

    Args:
        folder: Where prepared slices are kept.
        labels: Label name to value in the label maps.
        size: Longest side in pixels.
        window_for: The window of an image for a request; called with an empty request.
        window: The same policy in words and numbers: part of an entry's name.
        read: How an image file is read.
        disk_limit: Bytes kept in the folder; the least recently used entries go first.
    """

    folder: Path
    labels: Mapping[str, int]
    size: int
    window_for: WindowFor
    window: Mapping[str, Any] = field(default_factory=dict)
    read: ReadImage = read_image
    disk_limit: int = 2 << 30

    def load(self, case: Case) -> Slices:
        """The slices of one case; `Slices.cases` is 0.

        Raises:
            InputError: When the image or the label cannot be read.
        """
        entry = self.folder / f"{self._key(case)}.safetensors"
        try:
            arrays = load_file(entry)
            os.utime(entry)
        except (FileNotFoundError, SafetensorError):
            arrays = self._prepare(case)
            write_atomic(entry, save(arrays))
            self._trim(keep=entry)
        n = len(arrays["images"])
        return Slices(images=arrays["images"], labels=arrays["labels"], cases=np.zeros(n, np.int64))

    def load_all(self, cases: Sequence[Case], *, memory_limit: int = 512 << 20) -> Slices:
        """The slices of several cases together, thinned evenly where they exceed ``memory_limit`` bytes.

        Args:
            cases: At least one.
            memory_limit: Bytes of images and labels; every case keeps at least one slice.
        """
        per_case = max(1, memory_limit // (2 * self.size**2 * max(1, len(cases))))
        images, labels, owners = [], [], []
        for index, case in enumerate(cases):
            slices = self.load(case)
            kept = _evenly(np.arange(len(slices)), per_case)
            images.append(slices.images[kept])
            labels.append(slices.labels[kept])
            owners.append(np.full(len(kept), index, np.int64))
        return Slices(
            images=np.concatenate(images), labels=np.concatenate(labels), cases=np.concatenate(owners)
        )

    def _key(self, case: Case) -> str:
        parts = (
            _VERSION,
            file_key(case.image),
            file_key(case.label),
            list(self.labels.values()),
            self.size,
            SLICES_PER_CASE,
            EMPTY_SHARE,
            sorted(self.window.items()),
            self._probe(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _probe(self) -> list[Window]:
        """What the window policy does to a CT-like and an MR-like ramp: changes when the policy does."""
        out = []
        for low, high in ((-1000, 1000), (0, 1000)):
            ramp = np.linspace(low, high, 4096).astype(np.int16).reshape(64, 64, 1)
            image = Image(array=ramp, affine=np.eye(4), key=("probe", low, high), flat=False)
            out.append(self.window_for(image, {}))
        return out

    def _prepare(self, case: Case) -> dict[str, NDArray[np.uint8]]:
        image = self.read(case.image)
        labelmap = read_labelmap(case.label, image)
        table = np.zeros(max(256, int(labelmap.max()) + 1), np.uint8)
        for channel, value in enumerate(self.labels.values(), start=1):
            table[value] = channel
        filled = np.array([bool(table[labelmap[:, :, k]].any()) for k in range(image.shape[2])])
        chosen = choose_slices(filled, limit=SLICES_PER_CASE, empty_share=EMPTY_SHARE)
        window = self.window_for(image, {})
        images, labels = [], []
        for k in chosen:
            pixels = torch.from_numpy(windowed_slices(image, window, [k]))[:, None]
            images.append((to_square(pixels, self.size)[0, 0] * 255).round().to(torch.uint8).numpy())
            classes = np.ascontiguousarray(slice_image(table[labelmap[:, :, k : k + 1]], 0))
            labels.append(to_square(torch.from_numpy(classes)[None, None], self.size)[0, 0].numpy())
        return {"images": np.stack(images), "labels": np.stack(labels)}

    def _trim(self, *, keep: Path) -> None:
        entries = [(e.stat().st_mtime_ns, e.stat().st_size, e) for e in self.folder.glob("*.safetensors")]
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.disk_limit:
                return
            if entry != keep:
                entry.unlink(missing_ok=True)
                total -= size


def choose_slices(filled: NDArray[np.bool_], *, limit: int, empty_share: float) -> list[int]:
    """Which slices of a volume are trained on: evenly spaced, most of them with a label.

    Slices without any label teach where nothing is; too many of them teach that nothing is anywhere.

    Args:
        filled: (K,) bool, whether a slice holds a label.
        limit: Slices chosen at most.
        empty_share: Share of the chosen that are empty, where there are any.

    Returns:
        Slice indices, ascending; at least one.
    """
    with_label, empty = np.flatnonzero(filled), np.flatnonzero(~filled)
    share = empty_share if len(with_label) else 1.0
    some = _evenly(with_label, max(1, round(limit * (1.0 - share))))
    allowed = round(len(some) * share / (1.0 - share)) if share < 1.0 else limit
    return sorted([*some.tolist(), *_evenly(empty, min(allowed, limit)).tolist()])


def _evenly(values: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """At most ``count`` of the values, evenly spaced."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(int)] if count else values[:0]


def sampling_weights(slices: Slices, *, classes: int) -> NDArray[np.float64]:
    """How often each slice is drawn, so that rare labels and small cases are not drowned.

    Every label that occurs at all, and "no label", get the same share; within a label every case gets the
    same share.

    Args:
        slices: The training slices.
        classes: Number of labels without background.

    Returns:
        (n,) float64 that sums to 1.
    """
    pixels = slices.labels.reshape(len(slices), -1)
    present = np.stack([(pixels == c).any(axis=1) for c in range(1, classes + 1)])
    groups = [*present, ~present.any(axis=0)]
    weights = np.zeros(len(slices))
    for group in groups:
        if not group.any():
            continue
        per_case = np.bincount(slices.cases[group], minlength=int(slices.cases.max()) + 1)
        share = group / np.maximum(per_case[slices.cases], 1)
        weights += share / share.sum()
    return weights / weights.sum()
