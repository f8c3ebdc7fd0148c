"""NIfTI-1 and NIfTI-2 in one file, plain or gzipped; placed in the world as ITK places them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from sam_infer.formats.stored import DEFLATE, Stored, check_count, check_size, read_array
from sam_infer.geometry import LPS_TO_RAS, is_regular

#: What may lie between the header and the voxels, in bytes: extensions, which are passed over.
_MAX_OFFSET = 64 << 20
#: Millimetres of a unit, by the first three bits of ``xyzt_units``; ITK takes all others for millimetres.
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
_FLOAT32 = np.dtype(np.float32)


def read_nifti(path: Path, *, voxels: int | None = None) -> Stored:
    """Read a ``.nii`` or ``.nii.gz`` file; RGB has its channels last.

    Args:
        path: The file.
        voxels: How many it may hold; None = any number.

    Raises:
        TooManyVoxelsError: When its header tells of more than ``voxels``.
        TooLargeError: When its voxels take more than is read.
        ValueError: When it is damaged, or holds several time points or channels.
    """
    size, packed = path.stat().st_size, path.name.lower().endswith(".gz")
    with path.open("rb") as file, igzip.open(file) if packed else file as opened:
        stream = cast(BinaryIO, opened)
        header = _header(stream)
        offset = int(header["vox_offset"])
        if not header.sizeof_hdr <= offset <= _MAX_OFFSET:
            raise ValueError(f"its voxels lie at byte {offset}, not behind the header in the same file")
        stream.seek(offset)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        check_count(shape, voxels)
        slope, inter = header.get_slope_inter()
        scaled = dtype.fields is None and slope is not None and (slope, inter) != (1.0, 0.0)
        if scaled:
            check_size(shape, _FLOAT32)
        array = read_array(stream, shape, dtype, holds=size * (DEFLATE if packed else 1))
        stream.read(1)  # at its end, gzip compares its checksum
    if scaled:
        with np.errstate(all="ignore"):
            array = array.astype(np.float32)
            array *= slope
            array += inter
    affine, placed = _place(header)
    return Stored(array=_channels_last(array), affine=affine, placed=placed)


def _header(stream: BinaryIO) -> nib.Nifti1Header:
    """The header alone; extensions have a length that only the file vouches for."""
    block = stream.read(nib.Nifti1Header.sizeof_hdr)
    for order in ("little", "big"):
        if int.from_bytes(block[:4], order) == nib.Nifti2Header.sizeof_hdr:  # type: ignore[arg-type]
            rest = nib.Nifti2Header.sizeof_hdr - nib.Nifti1Header.sizeof_hdr
            return nib.Nifti2Header(block + stream.read(rest))
    return nib.Nifti1Header(block)


def _place(header: nib.Nifti1Header) -> tuple[NDArray[np.float64], bool]:
    """Voxel to RAS in mm, and False where the header names no place and voxel 0 becomes ITK's origin."""
    scale = np.diag([_MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)] * 3 + [1.0])
    for form in (header.get_sform, header.get_qform):
        affine = form(coded=True)[0]
        if affine is not None and is_regular(affine):
            return scale @ affine, True
    sides = [*np.asarray(header["pixdim"][1:4], np.float64), 1.0]
    return scale @ LPS_TO_RAS @ np.diag(sides), False


def _channels_last(array: NDArray) -> NDArray:
    """(I, J, K) or (I, J, K, C) from NIfTI's axes i, j, k, time, channel, or from a type with R, G and B."""
    colour = array.dtype.fields is not None
    if array.ndim == 5 and array.shape[3] == 1 and array.shape[4] > 1:
        return array[:, :, :, 0]
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 3:
        raise ValueError(f"shape {array.shape} holds several time points or channels")
    if array.ndim == 2:
        array = array[..., None]
    return np.stack([array[c] for c in "RGB"], axis=-1) if colour else array
