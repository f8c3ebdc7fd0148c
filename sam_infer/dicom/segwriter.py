"""Label maps as DICOM SEG: one binary segment a label, on the frames of the series' own slices.

Written with pydicom alone: highdicom keeps a byte for every pixel of every frame of every label in memory and
wants headers without a fault, itkimage2segimage writes no empty label map and no enhanced image's.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid
from pydicom.valuerep import format_number_as_ds
from skimage.color import rgb2lab

from sam_infer.dicom.codes import code, property_codes
from sam_infer.dicom.frames import read_frames
from sam_infer.dicom.planes import stack
from sam_infer.dicom.series import Series
from sam_infer.errors import InputError
from sam_infer.geometry import LPS_TO_RAS

#: Copied from the images where they have it: the patient and the study.
_COPIED = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
#: Of these, what a DICOM SEG must have, if empty.
_NEEDED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
_SERIES_NUMBER = 300
_LONG_STRING = 64


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """Where slice k came from.

    Args:
        reference: An item of SourceImageSequence.
        position: ImagePositionPatient.
    """

    reference: Dataset
    position: list


def write_seg(
    labelmap: NDArray[np.uint8],
    series: Series,
    *,
    names: Mapping[int, str],
    colors: Mapping[int, tuple[int, int, int]] | None = None,
    description: str,
    creator: str,
    algorithm: str | None,
) -> bytes:
    """A label map as a DICOM SEG file of its own series, beside the images in their study.

    Values that occur become segments 1, 2, ... in rising order; who reads them goes by name. An empty label
    map is one segment, the lowest of ``names``, with one empty frame: the standard wants one of each.

    Args:
        labelmap: (I, J, K) uint8 on the voxels of ``series``, 0 = nothing.
        series: What it was drawn on.
        names: Value -> label name. A value without one is called "label 7".
        colors: Value -> (R, G, B), 0 to 255, for viewers; None = they choose.
        description: SeriesDescription.
        creator: Who accepted it (ContentCreatorName).
        algorithm: The model's name where one proposed it; None = drawn by hand.

    Raises:
        InputError: (422) When the label map is not on the series' voxels, or the series' images have no UIDs
            to refer to.
    """
    shape = series.array.shape[:3]
    if labelmap.shape != shape:
        raise InputError(
            "label", labelmap.shape, f"the label must have the image's shape {shape}", status=422
        )
    slices = _slices(series)
    present = [_values(labelmap[:, :, k]) for k in range(shape[2])]
    values = sorted(set().union(*present))
    frames = [(n, k) for n, value in enumerate(values, 1) for k in range(shape[2]) if value in present[k]]
    masks: Iterator[NDArray[np.bool_]] = (labelmap[:, :, k] == values[n - 1] for n, k in frames)
    if not frames:
        values, frames = [min(names, default=1)], [(1, 0)]
        masks = iter([np.zeros(shape[:2], bool)])
    data = _described(series, slices)
    data.SeriesDescription = data.ContentDescription = _text(description)
    data.ContentCreatorName = _text(creator.replace("=", " "))
    data.SegmentSequence = [
        _segment(number, names.get(value, f"label {value}"), (colors or {}).get(value), algorithm)
        for number, value in enumerate(values, 1)
    ]
    data.PerFrameFunctionalGroupsSequence = _frames(frames, slices)
    data.NumberOfFrames = len(frames)
    data.PixelData = _packed(masks)
    data["PixelData"].VR = "OB"
    return _file(data)


def _values(labels: NDArray[np.uint8]) -> set[int]:
    """The values that occur in a slice, without 0."""
    return set(np.flatnonzero(np.bincount(labels.ravel(order="K"))).tolist()) - {0}


def _slices(series: Series) -> list[_Slice]:
    """Where each k came from; errors as `write_seg`."""
    count = series.array.shape[2]
    if len(series.slices) == count > 1:
        wanted = ["SOPClassUID", "SOPInstanceUID", "ImagePositionPatient"]
        headers: list[Dataset] = [
            pydicom.dcmread(p, stop_before_pixels=True, specific_tags=wanted) for p in series.slices
        ]
        numbers: list[int | None] = [None] * count
    else:
        headers = [series.header] * count
        numbers = [None] if count == 1 else [n + 1 for n in _order(series.header)]
    uids = [str(header.get("SOPInstanceUID") or "") for header in headers]
    if not all([*uids, series.header.get("SeriesInstanceUID"), series.header.get("StudyInstanceUID")]):
        remedy = (
            "its images have no UIDs for a DICOM SEG to refer to (removed on anonymising); give them new ones"
        )
        raise InputError("image", series.slices[0].parent.name, remedy, status=422)
    lps = LPS_TO_RAS @ series.affine
    found = []
    for k, (header, number) in enumerate(zip(headers, numbers, strict=True)):
        reference = Dataset()
        reference.ReferencedSOPClassUID = header.SOPClassUID
        reference.ReferencedSOPInstanceUID = header.SOPInstanceUID
        if number is not None:
            reference.ReferencedFrameNumber = number
        position = header.get("ImagePositionPatient") or _decimals(lps[:3, 3] + k * lps[:3, 2])
        found.append(_Slice(reference=reference, position=list(position)))
    return found


def _order(header: Dataset) -> list[int]:
    """The index of the frame of each k, of an image of many frames."""
    return stack([frame.plane for frame in read_frames(header) if frame.plane is not None])[0]


def _described(series: Series, slices: Sequence[_Slice]) -> Dataset:
    """All that does not depend on the label map."""
    source, data, now = series.header, Dataset(), datetime.now()
    data.SpecificCharacterSet = "ISO_IR 192"
    for name in _NEEDED:
        setattr(data, name, "")
    for name in _COPIED:
        if name in source:
            data[name] = source[name]
    data.FrameOfReferenceUID = source.get("FrameOfReferenceUID") or generate_uid(
        entropy_srcs=[str(source.SeriesInstanceUID), "frame of reference"]
    )
    data.SOPClassUID, data.SOPInstanceUID = SegmentationStorage, generate_uid()
    data.Modality, data.SeriesInstanceUID = "SEG", generate_uid()
    data.SeriesNumber, data.InstanceNumber = _SERIES_NUMBER, 1
    data.SeriesDate = data.ContentDate = data.InstanceCreationDate = now.strftime("%Y%m%d")
    data.SeriesTime = data.ContentTime = data.InstanceCreationTime = now.strftime("%H%M%S")
    data.Manufacturer = data.ManufacturerModelName = "samloop"
    data.DeviceSerialNumber, data.SoftwareVersions = "none", version("samloop")
    data.ContentLabel, data.ImageType = "SEGMENTATION", ["DERIVED", "PRIMARY"]
    data.SegmentationType, data.SegmentsOverlap = "BINARY", "NO"
    data.LossyImageCompression = "00"
    if source.get(_LOSSY[0]) == "01" and all(source.get(name) for name in _LOSSY):
        for name in _LOSSY:
            data[name] = source[name]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.Columns, data.Rows = series.array.shape[:2]
    data.BitsAllocated, data.BitsStored, data.HighBit = 1, 1, 0
    data.ReferencedSeriesSequence = [_references(source, slices)]
    data.SharedFunctionalGroupsSequence = [_shared(series.affine)]
    organization = Dataset()
    organization.DimensionOrganizationUID = generate_uid()
    data.DimensionOrganizationSequence = [organization]
    data.DimensionIndexSequence = [
        _dimension(organization, "ReferencedSegmentNumber", "SegmentIdentificationSequence"),
        _dimension(organization, "ImagePositionPatient", "PlanePositionSequence"),
    ]
    return data


def _references(source: Dataset, slices: Sequence[_Slice]) -> Dataset:
    """The series and each of its instances, once."""
    item, seen = Dataset(), {}
    for place in slices:
        instance = Dataset()
        instance.ReferencedSOPClassUID = place.reference.ReferencedSOPClassUID
        instance.ReferencedSOPInstanceUID = place.reference.ReferencedSOPInstanceUID
        seen[str(instance.ReferencedSOPInstanceUID)] = instance
    item.SeriesInstanceUID, item.ReferencedInstanceSequence = source.SeriesInstanceUID, list(seen.values())
    return item


def _shared(affine: NDArray[np.float64]) -> Dataset:
    """The functional groups of all frames: pixel size and orientation."""
    lps = (LPS_TO_RAS @ affine)[:3, :3]
    across, down, distance = np.linalg.norm(lps, axis=0)
    measures, orientation, group = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = _decimals([down, across])
    measures.SliceThickness = measures.SpacingBetweenSlices = _decimals([distance])[0]
    orientation.ImageOrientationPatient = _decimals([*(lps[:, 0] / across), *(lps[:, 1] / down)])
    group.PixelMeasuresSequence, group.PlaneOrientationSequence = [measures], [orientation]
    return group


def _dimension(organization: Dataset, pointer: str, group: str) -> Dataset:
    item = Dataset()
    item.DimensionOrganizationUID = organization.DimensionOrganizationUID
    item.DimensionIndexPointer = tag_for_keyword(pointer)
    item.FunctionalGroupPointer = tag_for_keyword(group)
    item.DimensionDescriptionLabel = pointer
    return item


def _segment(number: int, name: str, color: tuple[int, int, int] | None, algorithm: str | None) -> Dataset:
    item = Dataset()
    category, kind = property_codes(name)
    item.SegmentedPropertyCategoryCodeSequence = [category]
    item.SegmentNumber, item.SegmentLabel = number, _text(name)
    item.SegmentAlgorithmType = "SEMIAUTOMATIC" if algorithm else "MANUAL"
    if algorithm:
        item.SegmentAlgorithmName = _text(algorithm)
    if color is not None:
        item.RecommendedDisplayCIELabValue = _cielab(color)
    item.SegmentedPropertyTypeCodeSequence = [kind]
    return item


def _cielab(color: tuple[int, int, int]) -> list[int]:
    """CIELab as DICOM scales it to 16 bits (PS3.3 C.10.7.1.1)."""
    light, a, b = rgb2lab(np.array(color, np.float64)[None, None] / 255)[0, 0]
    scaled = np.array([light / 100, (a + 128) / 255, (b + 128) / 255]) * 65535
    return [int(v) for v in np.clip(np.rint(scaled), 0, 65535)]


def _frames(frames: Sequence[tuple[int, int]], slices: Sequence[_Slice]) -> list[Dataset]:
    """The functional groups of each (segment number, k)."""
    used = sorted({k for _, k in frames})
    index = {k: n for n, k in enumerate(used, 1)}
    derivations = {k: _derivation(slices[k].reference) for k in used}
    positions = {k: Dataset() for k in used}
    for k, item in positions.items():
        item.ImagePositionPatient = slices[k].position
    groups = []
    for number, k in frames:
        group, content, segment = Dataset(), Dataset(), Dataset()
        content.DimensionIndexValues = [number, index[k]]
        segment.ReferencedSegmentNumber = number
        group.DerivationImageSequence, group.FrameContentSequence = [derivations[k]], [content]
        group.PlanePositionSequence, group.SegmentIdentificationSequence = [positions[k]], [segment]
        groups.append(group)
    return groups


def _derivation(reference: Dataset) -> Dataset:
    source, item = Dataset(), Dataset()
    source.update(reference)
    source.SpatialLocationsPreserved = "YES"
    source.PurposeOfReferenceCodeSequence = [
        code("121322", "Source image for image processing operation", scheme="DCM")
    ]
    item.DerivationCodeSequence = [code("113076", "Segmentation", scheme="DCM")]
    item.SourceImageSequence = [source]
    return item


def _packed(masks: Iterator[NDArray[np.bool_]]) -> bytes:
    """(I, J) masks as bits without gaps between frames, rows first, the lowest bit first."""
    parts, rest = [], np.zeros(0, bool)
    for mask in masks:
        bits = np.concatenate([rest, mask.ravel(order="F")])
        whole = len(bits) // 8 * 8
        parts.append(np.packbits(bits[:whole], bitorder="little").tobytes())
        rest = bits[whole:]
    content = b"".join([*parts, np.packbits(rest, bitorder="little").tobytes()])
    return content + b"\0" * (len(content) % 2)


def _file(data: Dataset) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta, data.is_little_endian, data.is_implicit_VR = meta, True, False
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, write_like_original=False)
    return buffer.getvalue()


def _decimals(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    """Numbers as DICOM writes them, in 16 characters at most."""
    return [format_number_as_ds(float(value)) for value in values]


def _text(text: str) -> str:
    """A single long string: no control characters, no backslash, 64 characters at most."""
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in text)
    return " ".join(plain.split())[:_LONG_STRING]
