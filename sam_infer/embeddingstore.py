"""Slice embeddings on disk, so that no slice is encoded again after a restart or in another process."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sam_infer.engines.base import Embedding
from sam_infer.files import sweep, write_atomic
from sam_infer.types import FloatArray

logger = logging.getLogger(__name__)

#: Bytes of the disk that are left free: beyond, nothing more is written.
RESERVE = 2 << 30
#: What is left after entries were dropped for a new one, of the limit.
_LOW_WATER = 0.9
#: Seconds for which the size of the folder is taken to be known, apart from what is written here.
_KNOWN_SECONDS = 60.0
_FORMAT = "samloop-embedding-1"
_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An embedding as it is kept: in half precision where it was in single precision.

    What is kept in memory is rounded as what is kept on disk, so a click gives the same answer from both.

    Args:
        image_size: (H, W) of the encoded slice in pixels.
        features: The engine's tensors by name.
        narrowed: Names of the tensors that were float32.
    """

    image_size: tuple[int, int]
    features: dict[str, torch.Tensor]
    narrowed: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Memory of the features in bytes."""
        return sum(t.element_size() * t.nelement() for t in self.features.values())

    def on(self, device: str) -> Packed:
        """The same, its tensors on a torch device."""
        features = {name: tensor.to(device) for name, tensor in self.features.items()}
        return Packed(image_size=self.image_size, features=features, narrowed=self.narrowed)

    def unpacked(self) -> Embedding:
        """The embedding as engines take it."""
        features = {n: t.float() if n in self.narrowed else t for n, t in self.features.items()}
        return Embedding(image_size=self.image_size, features=features)


def pack(embedding: Embedding, *, narrow: bool) -> Packed:
    """An embedding to be kept; ``narrow`` rounds float32 to float16 where no value is too large for it."""
    half = {n: t.half() for n, t in embedding.features.items() if narrow and t.dtype == torch.float32}
    half = {n: t for n, t in half.items() if bool(t.isfinite().all())}
    return Packed(
        image_size=embedding.image_size, features={**embedding.features, **half}, narrowed=frozenset(half)
    )


def content_key(values: FloatArray, fingerprint: str) -> str:
    """What an embedding follows from, in 64 hexadecimal digits: the engine, and what it was shown.

    Equal pixels have one key wherever they lie: in a copy of the file, or in a backup that was restored. Of a
    file that changed, only the slices that changed have new keys.

    Args:
        values: (H, W) or (H, W, 3) float32, the windowed slice or crop that the engine encodes.
        fingerprint: The engine's.
    """
    digest = hashlib.sha256(f"{_FORMAT} {fingerprint} {values.shape} {values.dtype}".encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


class EmbeddingStore:
    """A folder of embeddings with a limit in bytes; the least recently used go first.

    Several processes may share it: an entry is one file that is there whole or not at all, its time of change
    says when it was last used, and its name is its key. A file that does not hold what was written is
    removed, with a warning, and never served.

    Args:
        folder: Where the files lie; made on the first write. Nothing is written elsewhere.
        limit: Bytes kept at most. Where several processes write at once they may be over it for a minute.
        reserve: Bytes of the disk that are left free.

    Attributes:
        failing: True while nothing can be written.
    """

    def __init__(self, *, folder: Path, limit: int, reserve: int = RESERVE) -> None:
        self.folder = folder
        self.limit = limit
        self.reserve = reserve
        self._lock = threading.Lock()
        self._bytes = 0
        self._counted: float | None = None
        self.failing = False

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry; `get` may still find it damaged."""
        return self._path(key).is_file()

    def get(self, key: str) -> Packed | None:
        """The entry under a key from `content_key`, its tensors on the CPU; None where there is none."""
        path = self._path(key)
        try:
            with suppress(OSError):  # others may have made it, and what is missing shows when it is read
                os.utime(path)
            return _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("Embedding %s cannot be read: %s", path.name, error)
            return None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("Embedding %s is damaged (%s); it is dropped and made again", path.name, error)
            with suppress(OSError):
                path.unlink()
            return None

    def put(self, key: str, packed: Packed) -> bool:
        """Keep an entry.

        Returns:
            False where it was not kept: it is larger than the limit, the disk is nearly full, or it cannot be
            written to; the last two are told in the log, once until it works again.
        """
        content = _content(packed)
        if len(content) > self.limit:
            return False
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free - len(content)
            if free < self.reserve:
                raise OSError(f"{free >> 20} MB would be free, {self.reserve >> 20} MB are left to others")
            with self._lock:
                self._make_room(len(content))
            write_atomic(path, content)
        except OSError as error:
            if not self.failing:
                logger.warning("Embeddings are not kept on disk for now: %s", error)
            self.failing = True
            return False
        with self._lock:
            self._bytes += len(content)
        self.failing = False
        return True

    def nbytes(self) -> int:
        """Bytes of all entries, counted now."""
        with self._lock:
            return sum(size for _, size, _ in self._count())

    def _make_room(self, size: int) -> None:
        now = time.monotonic()
        known = self._counted is not None and now - self._counted < _KNOWN_SECONDS
        if known and self._bytes + size <= self.limit:
            return
        entries = self._count()
        if self._bytes + size <= self.limit:
            return
        for _, length, path in sorted(entries):
            if self._bytes + size <= _LOW_WATER * self.limit:
                break
            path.unlink(missing_ok=True)
            self._bytes -= length

    def _count(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, file) of all entries; removes what killed writers left."""
        entries = []
        for shard in self.folder.iterdir() if self.folder.is_dir() else ():
            if self._counted is None:
                sweep(shard)
            for path in shard.glob(f"*{_SUFFIX}"):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    entries.append((stat.st_mtime, stat.st_size, path))
        self._bytes, self._counted = sum(size for _, size, _ in entries), time.monotonic()
        return entries


def _content(packed: Packed) -> bytes:
    features = {name: tensor.cpu().contiguous() for name, tensor in packed.features.items()}
    facts = {"image_size": list(packed.image_size), "narrowed": sorted(packed.narrowed)}
    metadata = {"format": _FORMAT, "facts": json.dumps(facts), "sha256": _digest(features, json.dumps(facts))}
    return bytes(save(features, metadata))


def _read(path: Path) -> Packed:
    content = path.read_bytes()  # at once: another process may drop the file at any time
    features = load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if metadata["format"] != _FORMAT or metadata["sha256"] != _digest(features, metadata["facts"]):
        raise ValueError("its content is not what was written")
    facts = json.loads(metadata["facts"])
    height, width = facts["image_size"]
    return Packed(image_size=(height, width), features=features, narrowed=frozenset(facts["narrowed"]))


def _digest(features: Mapping[str, torch.Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name in sorted(features):
        tensor = features[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
