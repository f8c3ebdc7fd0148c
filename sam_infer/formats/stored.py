"""What a file holds, read no further than its header says and no further than `MAX_BYTES`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

#: Bytes of voxels that a file may hold when it is decoded.
MAX_BYTES = 4 << 30
#: What one byte of gzip can become at most.
DEFLATE = 1032
_CHUNK = 16 << 20


class TooLargeError(ValueError):
    """The file holds more than is read; the text says how much is."""


class TooManyVoxelsError(ValueError):
    """The header tells of more voxels than were asked for.

    Args:
        shape: As the header says.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(int(n) for n in shape)
        super().__init__(f"shape {self.shape} has too many voxels")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The voxels of a file and their place.

    Args:
        array: (I, J, K) of the stored type, or (I, J, K, C) where a voxel has several channels.
        affine: (4, 4) float64, voxel (i, j, k) to world RAS in mm.
        placed: False where the file says nothing of its place, so that ``affine`` is a reader's custom.
    """

    array: NDArray
    affine: NDArray[np.float64]
    placed: bool


def check_size(shape: Sequence[int], dtype: np.dtype, *, holds: float = math.inf) -> int:
    """Bytes that an array takes, where that can be true and is not too much.

    Args:
        shape: As the header says.
        dtype: Its voxels.
        holds: Bytes that the file can hold at most, given its size.

    Raises:
        TooLargeError: When it takes more than `MAX_BYTES`.
        ValueError: When the file cannot hold it, it has no voxels, or a voxel is not a real number or RGB.
    """
    if dtype.kind not in "iufb" and not {"R", "G", "B"} <= set(dtype.names or ()):
        raise ValueError(f"voxel type {dtype} is not a real number")
    if min(shape, default=0) < 1:
        raise ValueError(f"has no voxels (shape {tuple(shape)})")
    size = math.prod(int(n) for n in shape) * dtype.itemsize
    if size > MAX_BYTES:
        raise TooLargeError(f"its voxels take {size} bytes; send at most {MAX_BYTES} bytes of voxels")
    if size > holds:
        raise ValueError(f"the file is too short for the {size} bytes of voxels of its header")
    return size


def check_count(shape: Sequence[int], voxels: int | None) -> None:
    """Refuse a header of more voxels than are asked for, before any is read.

    Args:
        shape: As the header says.
        voxels: How many there may be; None = any number.

    Raises:
        TooManyVoxelsError: When there are more.
    """
    if voxels is not None and math.prod(int(n) for n in shape) > voxels:
        raise TooManyVoxelsError(shape)


def read_array(
    stream: BinaryIO, shape: Sequence[int], dtype: np.dtype, *, holds: float = math.inf
) -> NDArray:
    """Read an array from where a stream stands, and nothing after it.

    Memory is touched only as far as the stream really gets.

    Args:
        stream: Delivers the decoded bytes, first axis fastest.
        shape: As the header says.
        dtype: Its voxels.
        holds: Bytes that the file can hold at most, given its size.

    Returns:
        Array of ``shape``, Fortran ordered, writable.

    Raises:
        TooLargeError: When it takes more than `MAX_BYTES`.
        ValueError: As `check_size`, and when the stream ends before the array does.
    """
    size = check_size(shape, dtype, holds=holds)
    content = np.empty(size, np.uint8)
    view, filled = content.data, 0
    while filled < size:
        count = stream.readinto(view[filled : filled + _CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"the file ends after {filled} of the {size} bytes of voxels of its header")
        filled += count
    return content.view(dtype).reshape(tuple(shape), order="F")
