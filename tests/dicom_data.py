"""DICOM series for tests: small ones written here, and the real ones beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

#: Real series, beside the checkout; SAMLOOP_DICOM names another folder.
DICOM = Path(os.environ.get("SAMLOOP_DICOM", Path(__file__).resolve().parents[2] / "shared" / "dicom"))
#: Columns to the left, rows to the back, slices upwards: the usual axial scan, 1 x 1 x 2 mm, as RAS.
AXIAL = np.diag([-1.0, -1.0, 2.0, 1.0])
SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}


def real_dicom(name: str) -> Path:
    """A folder or file of the real series, or a skip that names it."""
    path = DICOM / name
    if not path.exists():
        pytest.skip(f"{name} is not there ({DICOM} or SAMLOOP_DICOM)")
    return path


def write_series(
    folder: Path,
    array_ijk: np.ndarray,
    *,
    affine: np.ndarray = AXIAL,
    modality: str = "CT",
    reverse: bool = False,
    patient: str = "TEST",
    study_uid: str | None = None,
    series_uid: str | None = None,
    description: str = "",
    slope: float = 1.0,
    intercept: float = 0.0,
    change: Callable[[Dataset, int], None] | None = None,
) -> list[Path]:
    """Write a volume as one DICOM file a slice, named by InstanceNumber.

    Args:
        folder: Where to; it is made.
        array_ijk: (I, J, K) int16, uint16 or uint8 as stored, or (I, J, K, 3) uint8 for RGB; I = columns,
            J = rows.
        affine: (4, 4) voxel to world RAS in mm, its third column along the slices' normal, either way.
        modality: One of `SOP_CLASSES`.
        reverse: InstanceNumber falls while k rises.
        patient: PatientID and PatientName.
        study_uid: StudyInstanceUID; None = a new one.
        series_uid: SeriesInstanceUID; None = a new one.
        description: SeriesDescription.
        slope: RescaleSlope.
        intercept: RescaleIntercept.
        change: Called with each slice's dataset and its k, before it is written.

    Returns:
        The files in k's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study_uid, series_uid = study_uid or generate_uid(), series_uid or generate_uid()
    frame_uid, lps = generate_uid(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    sides = np.linalg.norm(lps[:3, :3], axis=0)
    count, paths = array_ijk.shape[2], []
    for k in range(count):
        number = count - k if reverse else k + 1
        data = _slice(array_ijk[:, :, k], SOP_CLASSES[modality], folder / f"{number:04d}.dcm")
        data.Modality, data.SeriesDescription = modality, description
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = patient, patient, "", ""
        data.StudyInstanceUID, data.SeriesInstanceUID = study_uid, series_uid
        data.FrameOfReferenceUID, data.PositionReferenceIndicator = frame_uid, ""
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20240102", "030405", "1", ""
        data.ReferringPhysicianName, data.Manufacturer = "", "samloop tests"
        data.SeriesNumber, data.InstanceNumber, data.AcquisitionNumber = 1, number, 1
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.ImagePositionPatient = [_decimal(v) for v in lps[:3, 3] + k * lps[:3, 2]]
        data.ImageOrientationPatient = [_decimal(v) for axis in (0, 1) for v in lps[:3, axis] / sides[axis]]
        data.PixelSpacing = [_decimal(sides[1]), _decimal(sides[0])]
        data.SliceThickness = _decimal(sides[2])
        if array_ijk.ndim == 3:
            data.RescaleSlope, data.RescaleIntercept = _decimal(slope), _decimal(intercept)
        if change:
            change(data, k)
        data.save_as(data.filename, write_like_original=False)
        paths.append(Path(data.filename))
    return paths


def unplaced(data: Dataset, k: int) -> None:
    """A ``change`` of `write_series`: a picture without a place in the patient."""
    del data.ImagePositionPatient, data.ImageOrientationPatient, data.PixelSpacing


def _decimal(value: float) -> str:
    """A number as a DICOM decimal string of at most 16 characters."""
    return f"{value:.10g}" if abs(value) > 1e-4 else "0"


def _slice(image_ij: np.ndarray, sop_class: str, path: Path) -> FileDataset:
    """A dataset with the pixels of one slice, (I, J) or (I, J, 3)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.is_little_endian, data.is_implicit_VR = True, False
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    bits = 8 * image_ij.dtype.itemsize
    data.Columns, data.Rows = image_ij.shape[:2]
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(image_ij.dtype.kind == "i")
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    if image_ij.ndim == 3:
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.PixelData = np.ascontiguousarray(image_ij.swapaxes(0, 1)).tobytes()
    data["PixelData"].VR = "OW" if bits > 8 else "OB"
    if len(data.PixelData) % 2:
        data.PixelData += b"\0"
    return data


def repaired_abdomen(folder: Path, *, compressed: bool = False) -> list[Path]:
    """Copy the real CT of 20 slices with the UIDs that its anonymiser blanked.

    Args:
        folder: Where to; it is made.
        compressed: Keep the pixels in JPEG 2000; else they are decoded.

    Returns:
        The files in the order of their names; skips where the series is absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study_uid, series_uid, frame_uid, paths = generate_uid(), generate_uid(), generate_uid(), []
    for source in sorted(real_dicom("ct_abdomen_20").iterdir()):
        data = pydicom.dcmread(source)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = (
            study_uid,
            series_uid,
            frame_uid,
        )
        data.PatientID = data.PatientName = "ABDOMEN"
        if not compressed:
            data.decompress()
        paths.append(folder / f"{source.name.rpartition('.')[2]}.dcm")
        data.save_as(paths[-1], write_like_original=False)
    return paths


def write_enhanced(
    path: Path,
    array_ijk: np.ndarray,
    *,
    affine: np.ndarray = AXIAL,
    order: list[int] | None = None,
    intercepts: list[float] | None = None,
) -> Path:
    """Write a volume as one enhanced CT file.

    Args:
        path: The file; its folder is made.
        array_ijk: (I, J, K) int16 as stored.
        affine: As for `write_series`.
        order: The k of each frame; None = rising.
        intercepts: RescaleIntercept of each k; None = 0.
    """
    first = write_series(path.parent / "slices", array_ijk[:, :, :1], affine=affine)[0]
    data = pydicom.dcmread(first)
    first.unlink()
    first.parent.rmdir()
    order = list(range(array_ijk.shape[2])) if order is None else order
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing = (
        data.ImageOrientationPatient,
        data.PixelSpacing,
    )
    measures.SliceThickness = data.SliceThickness
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], []
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(data, name)
    del data.RescaleIntercept, data.SliceThickness
    for k in order:
        position, value, group = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [_decimal(v) for v in lps[:3, 3] + k * lps[:3, 2]]
        value.RescaleSlope, value.RescaleIntercept = 1, intercepts[k] if intercepts else 0
        value.RescaleType = "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [value]
        data.PerFrameFunctionalGroupsSequence.append(group)
    data.NumberOfFrames = len(order)
    data.PixelData = b"".join(np.ascontiguousarray(array_ijk[:, :, k].T).tobytes() for k in order)
    data.save_as(path, write_like_original=False)
    return path
