"""Cases as training slices, prepared once and kept small on disk; read from there when they are drawn."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sam_infer.files import write_atomic
from sam_infer.geometry import slice_image
from sam_infer.intensity import Window
from sam_infer.networks.unet import to_square, windowed_slices
from sam_infer.volumes import Image, empty_labelmap, file_key, read_image, read_labelmap
from trainers.data import Case, ReadImage, WindowFor

#: Slices kept of one case, at most.
SLICES_PER_CASE = 48
#: Share of those that hold no label, where the case has such slices.
EMPTY_SHARE = 0.25
_VERSION = "slices/3"


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

    def load(self, cases: Sequence[Case]) -> StoredSlices:
        """The slices of cases, prepared where they are not yet, and read when they are drawn.

        Raises:
            InputError: When an image or a label cannot be read.
        """
        entries = tuple(self._key(case) for case in cases)
        present = [self.rows(case, entry, "present") for case, entry in zip(cases, entries, strict=True)]
        owners = [np.full(len(rows), n, np.int64) for n, rows in enumerate(present)]
        return StoredSlices(
            store=self,
            origins=tuple(cases),
            entries=entries,
            cases=np.concatenate(owners),
            table=np.concatenate(present).astype(bool),
        )

    def rows(self, case: Case, entry: str, name: str, which: NDArray[np.int64] | None = None) -> NDArray:
        """Rows of a prepared case; all by default. Prepared anew where the entry is gone.

        Args:
            case: The case.
            entry: Its entry's name.
            name: "images" or "labels", (n, S, S) uint8 each; "present", (n, labels) uint8, what those labels
                hold; "native", the same of the slices at their own resolution; "indices", (n,) int64, of the
                slices.
            which: Indices of slices.
        """
        path = self.folder / f"{entry}.safetensors"
        try:
            return _rows(path, name, which)
        except (FileNotFoundError, SafetensorError):
            write_atomic(path, save(self._prepare(case)))
            self._trim(keep=path)
        return _rows(path, name, which)

    def _key(self, case: Case) -> str:
        parts = (
            _VERSION,
            file_key(case.image),
            None if case.label is None else file_key(case.label),
            case.slices,
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

    def _prepare(self, case: Case) -> dict[str, NDArray]:
        image = self.read(case.image)
        classes = self._classes(case, image)
        allowed = np.asarray(range(image.shape[2]) if case.slices is None else case.slices)
        filled = np.array([bool(classes[:, :, k].any()) for k in allowed])
        chosen = allowed[choose_slices(filled, limit=SLICES_PER_CASE, empty_share=EMPTY_SHARE)]
        window = self.window_for(image, {})
        channels = range(1, len(self.labels) + 1)
        images, labels, present, native = [], [], [], []
        for k in chosen.tolist():
            pixels = torch.from_numpy(windowed_slices(image, window, [k]))[:, None]
            images.append((to_square(pixels, self.size)[0, 0] * 255).round().to(torch.uint8).numpy())
            seen = torch.from_numpy(np.ascontiguousarray(slice_image(classes, k)))
            labels.append(to_square(seen[None, None], self.size)[0, 0].numpy())
            present.append(np.isin(channels, np.unique(labels[-1])).astype(np.uint8))
            native.append(np.isin(channels, np.unique(seen.numpy())).astype(np.uint8))
        rows = {"images": images, "labels": labels, "present": present, "native": native}
        return {**{name: np.stack(row) for name, row in rows.items()}, "indices": chosen.astype(np.int64)}

    def _classes(self, case: Case, image: Image) -> NDArray[np.uint8]:
        """(I, J, K) uint8: the network's channel of each voxel, 0 where the case has no label map."""
        if case.label is None:
            return empty_labelmap(image.shape)
        labelmap = read_labelmap(case.label, image)
        table = np.zeros(max(256, int(labelmap.max()) + 1), np.uint8)
        for channel, value in enumerate(self.labels.values(), start=1):
            table[value] = channel
        return table[labelmap]

    def _trim(self, *, keep: Path) -> None:
        entries = [(e.stat().st_mtime_ns, e.stat().st_size, e) for e in self.folder.glob("*.safetensors")]
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.disk_limit:
                return
            if entry != keep:
                entry.unlink(missing_ok=True)
                total -= size


@dataclass(frozen=True, kw_only=True)
class StoredSlices:
    """Slices of a `SliceStore`: of each batch only its own slices are in memory.

    Args:
        store: Where they are.
        origins: The cases.
        entries: Their entries' names, as they were when training began.
        cases: (n,) int64, which of them a slice comes from; slices of a case follow one another.
        table: (n, labels) bool, whether a slice holds a label.
    """

    store: SliceStore
    origins: tuple[Case, ...]
    entries: tuple[str, ...]
    cases: NDArray[np.int64]
    table: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.cases)

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images and labels of some slices, (m, S, S) uint8 each."""
        side = self.store.size
        images, labels = (np.empty((len(indices), side, side), np.uint8) for _ in range(2))
        owners = self.cases[indices]
        for owner in np.unique(owners).tolist():
            where = np.flatnonzero(owners == owner)
            rows = indices[where] - np.searchsorted(self.cases, owner)
            of = self.origins[owner], self.entries[owner]
            images[where] = self.store.rows(*of, "images", rows)
            labels[where] = self.store.rows(*of, "labels", rows)
        return images, labels

    def present(self, classes: int) -> NDArray[np.bool_]:
        """(n, classes) bool, whether a slice holds a label."""
        return self.table[:, :classes]


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


def _rows(path: Path, name: str, which: NDArray[np.int64] | None) -> NDArray:
    with safe_open(path, framework="np") as file:
        if which is None:
            os.utime(path)
            found: NDArray = file.get_tensor(name)
            return found
        rows = file.get_slice(name)
        count = rows.get_shape()[0]  # fewer than there were only where the case changed since
        return np.concatenate([rows[i : i + 1] for i in (which % count).tolist()])
