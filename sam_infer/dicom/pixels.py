"""The pixels of DICOM images: as stored, then as values.

Uncompressed pixels are read by numpy. Compressed ones are decoded by SimpleITK's GDCM, which knows JPEG in
all its kinds, JPEG 2000, JPEG-LS and RLE; it is handed one frame in a file with nothing but what describes
pixels, so that a damaged header never reaches it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_pixel_data_frame
from pydicom.pixel_data_handlers.util import apply_color_lut, convert_color_space
from pydicom.uid import SecondaryCaptureImageStorage
from SimpleITK import GetArrayFromImage, ImageFileReader

from sam_infer.formats.stored import check_size

_GREY = ("MONOCHROME1", "MONOCHROME2")
_RESCALE = 0x1050
_PALETTE = range(0x1101, 0x1224)


def stored_frames(data: Dataset) -> Iterator[NDArray]:
    """The frames of an image.

    Args:
        data: With its pixels and file meta information.

    Yields:
        (J, I) as stored, where the most is brightest (MONOCHROME1 is inverted, as SimpleITK does); or
        (J, I, 3) uint8 RGB.

    Raises:
        Exception: Of any kind, when the pixels are damaged.
    """
    count = int(data.get("NumberOfFrames") or 1)
    syntax = data.file_meta.TransferSyntaxUID
    grey = data.PhotometricInterpretation in _GREY
    check_size(
        (data.Columns, data.Rows, count, 1 if grey else 3), np.dtype(f"u{data.BitsAllocated // 8 or 1}")
    )
    if syntax.is_compressed:
        pieces = generate_pixel_data_frame(data.PixelData, count)
        decoded = (_decompressed(data, piece) for piece in pieces)
    else:
        decoded = iter(_native(data, count))
    found = 0
    for array in decoded:
        if array.shape[:2] != (data.Rows, data.Columns):
            raise ValueError(f"a frame has {array.shape[:2]} pixels, not {data.Rows} x {data.Columns}")
        found += 1
        yield _bright(data, _stored_bits(data, array)) if grey else _rgb(array)
    if found != count:
        raise ValueError(f"{found} of {count} frames are there")


def rescaled(stored: NDArray, slope: float, intercept: float) -> NDArray:
    """Values in the modality's unit (CT: HU) from stored ones; integers stay integers where they can."""
    if (slope, intercept) == (1.0, 0.0):
        return stored
    if stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        return stored.astype(np.int64) * int(slope) + int(intercept)
    return stored * slope + intercept


def _native(data: Dataset, count: int) -> NDArray:
    """(count, J, I) or (count, J, I, 3): uncompressed pixels, colours as RGB."""
    array, kind = data.pixel_array, data.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        array = apply_color_lut(array, data)
        array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    elif kind.startswith("YBR"):
        array = convert_color_space(array, "YBR_FULL" if kind == "YBR_FULL_422" else kind, "RGB")
    return array if count > 1 else array[None]


def _decompressed(data: Dataset, frame: bytes) -> NDArray:
    """(J, I) or (J, I, 3): one compressed frame."""
    alone = Dataset()
    for element in data.group_dataset(0x0028):
        if element.tag.element < _RESCALE or element.tag.element in _PALETTE:
            alone.add(element)
    alone.pop("NumberOfFrames", None)
    if data.PhotometricInterpretation in _GREY:
        alone.PhotometricInterpretation = "MONOCHROME2"
    alone.SOPClassUID, alone.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    alone.PixelData = encapsulate([frame], has_bot=False)
    alone["PixelData"].VR, alone["PixelData"].is_undefined_length = "OB", True
    alone.is_little_endian, alone.is_implicit_VR = True, False
    alone.file_meta = FileMetaDataset()
    alone.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory(prefix="samloop-") as folder:
        path = Path(folder) / "frame.dcm"
        dcmwrite(path, alone, write_like_original=False)
        reader = ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        return GetArrayFromImage(reader.Execute())[0]


def _stored_bits(data: Dataset, array: NDArray) -> NDArray:
    """Only the bits that hold the value: old overlays live in the others."""
    allocated, stored = data.BitsAllocated, data.BitsStored
    if stored >= allocated or array.dtype.itemsize * 8 != allocated or array.dtype.kind not in "iu":
        return array
    return (array << (allocated - 1 - data.HighBit)) >> (allocated - stored)


def _bright(data: Dataset, array: NDArray) -> NDArray:
    if data.PhotometricInterpretation != "MONOCHROME1":
        return array
    if array.dtype.kind == "f":
        return -array
    top = -1 if data.PixelRepresentation else (1 << data.BitsStored) - 1
    return np.asarray(top, array.dtype) - array


def _rgb(array: NDArray) -> NDArray[np.uint8]:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError("its colours are not 8-bit RGB; export it as 8-bit RGB or in shades of grey")
    return array
