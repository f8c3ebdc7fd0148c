"""The pool of images that crops are drawn from: made once, kept in flat files, read by memory map."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_multiotsu
from skimage.segmentation import felzenszwalb, slic

from trainers.pretrain.data import real_items
from trainers.pretrain.recipe import Common
from trainers.pretrain.synthetic import make_image

Bytes = NDArray[np.uint8]
Entry = tuple[Bytes, Bytes, str]
_VERSION = 2


class Pool:
    """Images and label maps by number.

    Args:
        folder: Where `build_pool` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / "index.json").read_text())
        self.entries: list[tuple[int, int, int, str]] = [tuple(e) for e in index["entries"]]
        self.groups: dict[str, list[int]] = {}
        for number, (_, _, _, kind) in enumerate(self.entries):
            self.groups.setdefault(kind, []).append(number)
        self._bytes = np.memmap(folder / "pool.bin", np.uint8, "r")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> tuple[Bytes, Bytes]:
        """(H, W) uint8 image and (H, W) uint8 labels, 0 = background."""
        start, height, width, _ = self.entries[number]
        pair = np.asarray(self._bytes[start : start + 2 * height * width]).reshape(2, height, width)
        return pair[0], pair[1]


def build_pool(folder: Path, data: Path | None, recipe: Common, seed: int, workers: int = 0) -> Pool:
    """Make the pool, or open it where the same one was made before.

    Args:
        folder: Where to write ``pool.bin`` and ``index.json``.
        data: Folder of the real sets; None or missing for images made by code only.
        recipe: Says how many images to make.
        seed: Of every random choice.
        workers: Processes that make images; the pool does not depend on it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    real = data is not None and data.is_dir()
    key = [_VERSION, recipe.synthetic, real, seed]
    index = folder / "index.json"
    if index.is_file() and json.loads(index.read_text())["key"] == key:
        return Pool(folder)
    if not real:
        print("no data folder: training on images made by code only", flush=True)
    entries, start = [], 0
    with (folder / "pool.bin.part").open("wb") as file:
        for image, labels, kind in _all_entries(data if real else None, recipe, seed, workers):
            file.write(image.tobytes() + labels.tobytes())
            entries.append([start, *image.shape, kind])
            start += 2 * image.size
            if len(entries) % 1000 == 0:
                print(f"pool: {len(entries)} images", flush=True)
    (folder / "pool.bin.part").replace(folder / "pool.bin")
    index.with_suffix(".part").write_text(json.dumps({"key": key, "entries": entries}))
    index.with_suffix(".part").replace(index)
    return Pool(folder)


def _all_entries(data: Path | None, recipe: Common, seed: int, workers: int) -> Iterator[Entry]:
    if data is not None:
        rng = np.random.default_rng([seed, 1])
        for item in real_items(data, rng):
            if item.labels is not None:
                yield item.image, item.labels, item.source
            if item.source != "cxr_lung_v7" or rng.random() < 0.3:
                yield item.image, _superpixels(item.image, rng), "pseudo"
            yield item.image, _threshold_regions(item.image, rng), "pseudo"
    seeds = [[seed, 2, number] for number in range(recipe.synthetic)]
    if not workers:
        yield from map(_made, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap(_made, seeds, chunksize=20)


def _made(seed: list[int]) -> Entry:
    return make_image(np.random.default_rng(seed))


def _superpixels(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Regions of like grey: graph based or k-means superpixels of a smoothed image."""
    smooth = ndimage.gaussian_filter(image.astype(np.float32) / 255, rng.uniform(0.5, 2))
    if rng.random() < 0.6:
        parts = felzenszwalb(smooth, scale=rng.uniform(30, 300), sigma=0, min_size=120) + 1
    else:
        parts = slic(smooth, n_segments=int(rng.integers(8, 40)), compactness=0.05, channel_axis=None)
    return _numbered(parts, smooth)


def _threshold_regions(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Connected parts of the classes of a multi-level Otsu threshold of a smoothed image."""
    smooth = ndimage.gaussian_filter(image.astype(np.float32) / 255, rng.uniform(1, 3))
    try:
        cuts = threshold_multiotsu(smooth, int(rng.integers(3, 5)), nbins=64)
    except ValueError:  # fewer grey values than classes
        return np.zeros(image.shape, np.uint8)
    classes = np.digitize(smooth, cuts)
    parts = np.zeros(image.shape, np.int64)
    for value in range(1, len(cuts) + 1):
        open_class = ndimage.binary_opening(classes == value, iterations=2)
        found, _ = ndimage.label(open_class)
        parts[found > 0] = found[found > 0] + parts.max()
    return _numbered(parts, smooth)


def _numbered(parts: np.ndarray, smooth: np.ndarray) -> Bytes:
    """Keep the 200 largest parts that are no bare black ground and no tiny speck."""
    sizes = np.bincount(parts.ravel())
    means = np.bincount(parts.ravel(), smooth.ravel()) / np.maximum(sizes, 1)
    sizes[0] = 0
    good = (sizes > 80) & (sizes < 0.5 * parts.size) & (means > 0.04)
    keep = [n for n in np.argsort(-sizes)[:200] if good[n]]
    table = np.zeros(len(sizes), np.uint8)
    table[keep] = np.arange(1, len(keep) + 1)
    return table[parts]
