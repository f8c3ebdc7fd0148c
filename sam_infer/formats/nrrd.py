"""NRRD with the voxels in the header's own file: nothing that a header names is ever opened."""

from __future__ import annotations

import bz2
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import nrrd
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from sam_infer.formats.stored import DEFLATE, Stored, check_count, check_size, read_array
from sam_infer.geometry import LPS_TO_RAS

_MAX_HEADER = 4 << 20
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_NAMES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
_TYPES = {name: code for code, names in _NAMES.items() for name in names.split(", ")}
_TEXT = ("ascii", "text", "txt")
#: Kinds of an axis along which voxels lie; along any other, the channels of one voxel.
_DOMAIN = ("domain", "space", "time", "none", "???")
#: Spaces other than LPS, to RAS. ITK takes every space without directions ("scanner-xyz") for LPS.
_TO_RAS = {
    "right-anterior-superior": np.eye(4),
    "ras": np.eye(4),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
}


def read_nrrd(path: Path, *, voxels: int | None = None) -> Stored:
    """Read a ``.nrrd`` file; channels come last.

    Args:
        path: The file.
        voxels: How many it may hold; None = any number.

    Raises:
        TooManyVoxelsError: When its header tells of more than ``voxels``.
        TooLargeError: When its voxels take more than is read.
        ValueError: When it is damaged, names another file, skips lines or bytes, or has two axes of channels.
    """
    with path.open("rb") as file:
        head = file.read(_MAX_HEADER)
        end = _BLANK_LINE.search(head)
        header = nrrd.read_header(io.BytesIO(head[: end.start()] if end else head))
        _check_attached(header)
        file.seek(end.end() if end else 0, io.SEEK_SET if end else io.SEEK_END)
        array = _voxels(file, header, path.stat().st_size, voxels)
    directions = _directions(header, array.ndim)
    kinds = header.get("kinds", ["domain"] * array.ndim)
    if len(kinds) != array.ndim or len(directions) != array.ndim:
        raise ValueError(f"kinds, spacings or space directions are not those of {array.ndim} axes")
    domain = [a for a in range(array.ndim) if kinds[a] in _DOMAIN and np.isfinite(directions[a]).all()]
    channels = [a for a in range(array.ndim) if a not in domain and array.shape[a] > 1]
    single = [a for a in range(array.ndim) if a not in domain and array.shape[a] == 1]
    if len(domain) not in (2, 3) or len(channels) > 1:
        raise ValueError(f"{len(domain)} axes of space and {len(channels)} of channels or time points")
    array = array.transpose([*single, *domain, *channels]).squeeze(tuple(range(len(single))))
    if len(domain) == 2:
        array = np.expand_dims(array, 2)
    return Stored(
        array=array, affine=_affine(header, directions[domain]), placed="space directions" in header
    )


def _check_attached(header: Mapping[str, Any]) -> None:
    for field in ("data file", "datafile"):
        if field in header:
            raise ValueError(f"{field}: the voxels must be in the header's own file; save it as one .nrrd")
    allowed: tuple[int, ...]
    for field, allowed in (("line skip", (0,)), ("byte skip", (0, -1))):
        value = header.get(field, header.get(field.replace(" ", ""), 0))
        if value not in allowed:
            raise ValueError(f"{field}: {value}; the voxels must follow the header")


def _voxels(file: BinaryIO, header: Mapping[str, Any], size: int, most: int | None) -> NDArray:
    """The array, axes as in the file; ``file`` stands behind the header."""
    missing = [field for field in ("type", "dimension", "sizes", "encoding") if field not in header]
    if missing:
        raise ValueError(f"the header lacks {', '.join(missing)}")
    shape, encoding = [int(n) for n in header["sizes"]], header["encoding"].lower()
    if len(shape) != header["dimension"]:
        raise ValueError(f"sizes {shape} are not those of {header['dimension']} axes")
    check_count(shape, most)
    dtype = _dtype(header)
    if encoding in _TEXT:
        count = check_size(shape, dtype, holds=size * dtype.itemsize) // dtype.itemsize
        values = np.fromfile(file, dtype, count, sep=" ")
        if values.size != count:
            raise ValueError(f"the file holds {values.size} of the {count} voxels of its header")
        return values.reshape(shape, order="F")
    if encoding == "raw":
        if -1 in (header.get("byte skip"), header.get("byteskip")):
            file.seek(-check_size(shape, dtype, holds=size), io.SEEK_END)
        return _all_of(file, shape, dtype, holds=size)
    if encoding in ("gzip", "gz"):
        with igzip.open(file) as stream:
            return _all_of(cast(BinaryIO, stream), shape, dtype, holds=size * DEFLATE)
    if encoding in ("bzip2", "bz2"):
        with bz2.open(file) as stream:
            return _all_of(cast(BinaryIO, stream), shape, dtype)
    raise ValueError(f"encoding {encoding} is not raw, gzip, bzip2 or ascii")


def _dtype(header: Mapping[str, Any]) -> np.dtype:
    code = _TYPES.get(header["type"].lower())
    if code is None:
        raise ValueError(f"voxel type {header['type']} is not a real number")
    order = {"little": "<", "big": ">"}.get(str(header.get("endian")).lower())
    if order is None and code[1] != "1" and header["encoding"].lower() not in _TEXT:
        raise ValueError(f"endian: {header.get('endian')} is neither little nor big")
    return np.dtype((order or "=") + code)


def _all_of(stream: BinaryIO, shape: list[int], dtype: np.dtype, *, holds: float = np.inf) -> NDArray:
    array = read_array(stream, shape, dtype, holds=holds)
    if stream.read(1):
        raise ValueError(f"the file holds more voxels than the {shape} of its header")
    return array


def _directions(header: Mapping[str, Any], axes: int) -> NDArray[np.float64]:
    """(axes, D): the step along each axis in the file's space; a row of NaN where an axis is not in space."""
    if "space directions" in header:
        return np.asarray(header["space directions"], np.float64)
    spacings = np.asarray(header.get("spacings", np.ones(axes)), np.float64)
    domain = [kind in _DOMAIN for kind in header.get("kinds", ["domain"] * axes)]
    directions = np.full((len(spacings), sum(domain)), np.nan)
    directions[domain] = np.diag(np.where(np.isfinite(spacings), spacings, 1.0)[domain])
    return directions


def _affine(header: Mapping[str, Any], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    axes, dimension = vectors.shape
    if dimension > 3:
        raise ValueError(f"the space has {dimension} dimensions")
    affine = np.eye(4)
    affine[:dimension, :axes] = vectors.T
    affine[:dimension, 3] = header.get("space origin", np.zeros(dimension))
    return _TO_RAS.get(str(header.get("space")).lower(), LPS_TO_RAS) @ affine
