"""A DICOM series as one volume, on the voxels that SimpleITK's series reader gives and viewers show."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from sam_infer.dicom.frames import Frame, read_frames
from sam_infer.dicom.pixels import rescaled, stored_frames
from sam_infer.dicom.planes import NotVolumeError, stack
from sam_infer.errors import InputError
from sam_infer.files import atomic_writer
from sam_infer.formats.stored import TooLargeError, check_size
from sam_infer.geometry import LPS_TO_RAS

#: What scans in slices: an image of these without a place in the patient is a screen capture or a report.
_SLICING = ("CT", "MR", "PT", "NM")
#: Segmentation Storage, and Label Map Segmentation Storage.
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_INT16 = np.iinfo(np.int16)
_DAMAGED = "send the series again from its source"


@dataclass(frozen=True, kw_only=True)
class Series:
    """A stack of slices as one volume.

    Args:
        array: (I, J, K) values after rescale, int16 where they fit and float32 where not, or (I, J, K, 3)
            uint8 for RGB; I = columns, J = rows, K = slices, rising along rows x columns. Fortran ordered.
        affine: (4, 4) float64, voxel (i, j, k) to world RAS in mm.
        slices: The file of each k; a multi-frame file is the only one.
        header: The header of slice 0 without pixels.
    """

    array: NDArray
    affine: NDArray[np.float64]
    slices: tuple[Path, ...]
    header: Dataset


def read_series(folder: Path) -> Series:
    """Read the series whose files lie in a folder: one a slice, or one with many frames.

    CT, MR and the like need at least three evenly spaced, parallel slices without tilt, or a single one that
    is no localizer. An image without a place in the patient (radiograph, ultrasound, photograph) is a volume
    of one slice with SimpleITK's geometry: LPS axes, the pixel size where it is told, 1 mm thick.

    Args:
        folder: Holds nothing but the series; hidden files, folders and DICOMDIR are passed over.

    Raises:
        InputError: (422) When a file is damaged or the images are no volume, (413) when it is larger than is
            read; the text says why and what to do.
    """
    name: str = folder.name
    try:
        paths = sorted(p for p in folder.iterdir() if p.is_file() and _told(p))
        headers = [_header(path) for path in paths]
        name = _one_series(paths, headers) or name
        return _read(paths, headers)
    except NotVolumeError as error:
        raise InputError("image", name, str(error), status=422) from error
    except TooLargeError as error:
        raise InputError("image", name, str(error), status=413) from error
    except Exception as error:  # whatever pydicom, numpy or GDCM make of a damaged file is the file's fault
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError("image", name, f"cannot be read ({reason[-1]}); {_DAMAGED}", status=422) from error


def save_volume(series: Series, path: Path) -> None:
    """Write a series as uncompressed NIfTI, whole or not at all, on the series' own voxels."""
    array = series.array
    if array.ndim == 4:
        array = np.ascontiguousarray(array).view([(channel, "u1") for channel in "RGB"])[..., 0]
    image = nib.Nifti1Image(array, series.affine)
    image.header.set_xyzt_units("mm")
    with atomic_writer(path) as writer:
        image.to_stream(cast(IOBase, writer))


def _told(path: Path) -> bool:
    return not path.name.startswith(".") and path.name != "DICOMDIR"


def _header(path: Path) -> Dataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from error


def _one_series(paths: Sequence[Path], headers: Sequence[Dataset]) -> str:
    """The SeriesInstanceUID of all; "" where anonymising removed it from all."""
    if not headers:
        raise NotVolumeError("the series has no images; send its files")
    uids = [str(header.get("SeriesInstanceUID") or "") for header in headers]
    found = sorted(set(uids))
    if len(found) > 1 and not found[0]:
        raise ValueError(f"{paths[uids.index('')].name}: has no SeriesInstanceUID, unlike the others")
    if len(found) > 1:
        raise NotVolumeError(
            f"several series in one folder ({len(found)}: {', '.join(found[:3])}); send each in a folder of "
            "its own"
        )
    return found[0]


def _check_images(headers: Sequence[Dataset]) -> None:
    for header in headers:
        kind = header.get("Modality") or "unknown modality"
        if "Rows" not in header or str(header.get("SOPClassUID")) in SEGMENTATIONS:
            raise NotVolumeError(f"no image series ({kind}); choose the images that it was made on")
    if len(headers) > 1 and any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers):
        raise NotVolumeError(f"{len(headers)} files of several frames each; send one of them alone")
    sizes = sorted({(int(header.Columns), int(header.Rows)) for header in headers})
    if len(sizes) > 1:
        told = ", ".join(f"{columns} x {rows}" for columns, rows in sizes[:4])
        raise NotVolumeError(f"the images have different sizes ({told} pixels); split the series by size")
    if len({header.SamplesPerPixel for header in headers}) > 1:
        raise NotVolumeError("some images have colours and some have not; split the series")


def _read(paths: Sequence[Path], headers: Sequence[Dataset]) -> Series:
    _check_images(headers)
    many = [read_frames(header) for header in headers]
    found = [frame for of_file in many for frame in of_file]
    order, affine = _placed(headers, found)
    if len(paths) == 1:
        header, slices, decoded = headers[0], tuple(paths), _frames_of(paths[0], order)
    else:
        header, slices = headers[order[0]], tuple(paths[n] for n in order)
        decoded = _slices(slices, headers[0])
    shape = (int(header.Columns), int(header.Rows), len(order))
    array = _assembled(decoded, [found[n] for n in order], shape)
    return Series(array=array, affine=affine, slices=slices, header=header)


def _placed(headers: Sequence[Dataset], found: Sequence[Frame]) -> tuple[list[int], NDArray[np.float64]]:
    """The order of the frames, and the volume's affine; errors as `stack`."""
    header = headers[0]
    planes = [frame.plane for frame in found if frame.plane is not None]
    if planes and len(planes) == len(found):
        if len(planes) == 1 and "LOCALIZER" in (header.get("ImageType") or ()):
            raise NotVolumeError("a localizer (scout), not a volume; choose a series that was planned on it")
        return stack(planes)
    if header.get("Modality") in _SLICING:
        raise NotVolumeError(
            f"not a volume: {len(found) - len(planes)} of {len(found)} images have no place in the patient "
            "(screen captures or reports); choose the series of the original slices"
        )
    if len(found) > 1:
        raise NotVolumeError(
            f"not a volume: {len(found)} single images ({header.get('Modality')}) without a place in the "
            "patient; send each as a series of its own"
        )
    across, down = _picture_spacing(header)
    return [0], LPS_TO_RAS @ np.diag([across, down, 1.0, 1.0])


def _picture_spacing(header: Dataset) -> tuple[float, float]:
    """Distance of pixels along and down a projection image in mm; at the detector first, as GDCM has it."""
    for name in ("ImagerPixelSpacing", "PixelSpacing"):
        spacing = [float(mm) for mm in header.get(name) or ()]
        if len(spacing) == 2 and np.isfinite(spacing).all() and min(spacing) > 0:
            return spacing[1], spacing[0]
    return 1.0, 1.0


def _frames_of(path: Path, order: Sequence[int]) -> Iterator[tuple[int, NDArray]]:
    """(k, stored frame) of one file."""
    place = {number: k for k, number in enumerate(order)}
    for number, stored in enumerate(_stored(path)):
        yield place[number], stored


def _slices(paths: Sequence[Path], header: Dataset) -> Iterator[tuple[int, NDArray]]:
    """(k, stored slice) of one file each; compressed ones are decoded side by side."""

    def read(path: Path) -> NDArray:
        (stored,) = _stored(path)
        return stored

    if not header.file_meta.TransferSyntaxUID.is_compressed:
        yield from enumerate(map(read, paths))
        return
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from enumerate(pool.map(read, paths))


def _stored(path: Path) -> Iterator[NDArray]:
    try:
        yield from stored_frames(pydicom.dcmread(path))
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from error


def _assembled(
    decoded: Iterator[tuple[int, NDArray]], found: Sequence[Frame], shape: tuple[int, int, int]
) -> NDArray:
    """The volume from (k, stored slice) in any order; ``found`` is in k's order."""
    check_size(shape, np.dtype(np.int16))
    volume: NDArray | None = None
    for k, stored in decoded:
        if stored.ndim == 3:
            if volume is None:
                volume = np.empty((*shape, 3), np.uint8)
            volume[:, :, k] = stored.swapaxes(0, 1)
            continue
        values = rescaled(stored, found[k].slope, found[k].intercept)
        if volume is None:
            volume = np.empty(shape, np.int16, order="F")
        if volume.dtype == np.int16 and not _fits(values):
            volume = volume.astype(np.float32, order="F")
        volume[:, :, k] = values.T
    assert volume is not None  # there is at least one frame
    return volume


def _fits(values: NDArray) -> bool:
    """Whether int16 holds them all."""
    if np.can_cast(values.dtype, np.int16):
        return True
    return values.dtype.kind in "iu" and _INT16.min <= values.min() and values.max() <= _INT16.max
