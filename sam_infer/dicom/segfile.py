"""DICOM SEG files by highdicom. Imported with the first of them: highdicom takes most of a second."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice

import numpy as np
from highdicom import AlgorithmIdentificationSequence, PlanePositionSequence
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixel_data_handlers.numpy_handler import pack_bits
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid
from skimage.color import rgb2lab

from sam_infer.dicom.codes import property_codes
from sam_infer.dicom.segsources import Sources

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
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
_FAMILY = Code("123110", "DCM", "Artificial Intelligence")
_SERIES_NUMBER = 300
_LONG_STRING = 64


class _Segmentation(Segmentation):
    """Of images of any class: from retired and private ones, highdicom fails to copy; `encoded` does it."""

    def copy_specimen_information(self, dataset: Dataset) -> None:
        pass

    def copy_patient_and_study_information(self, dataset: Dataset) -> None:
        pass


def described(
    number: int, name: str, color: tuple[int, int, int] | None, algorithm: str | None
) -> SegmentDescription:
    """A segment; the arguments are `sam_infer.dicom.segwriter.write_seg`'s."""
    category, kind = (CodedConcept.from_dataset(code) for code in property_codes(name))
    by_model = algorithm and AlgorithmIdentificationSequence(_text(algorithm), _FAMILY, version("samloop"))
    segment = SegmentDescription(
        segment_number=number,
        segment_label=_text(name),
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type="SEMIAUTOMATIC" if by_model else "MANUAL",
        algorithm_identification=by_model or None,
    )
    if color is not None:
        lab = rgb2lab(np.array(color, np.float64)[None, None] / 255)[0, 0]
        light, *hue = np.clip(lab, [0, -128, -128], [100, 127, 127]).tolist()
        segment.RecommendedDisplayCIELabValue = list(CIELabColor(light, *hue).value)
    return segment


def encoded(
    labelmap: NDArray[np.uint8],
    occurs: NDArray[np.bool_],
    sources: Sources,
    segments: Mapping[int, SegmentDescription],
    *,
    header: Dataset,
    description: str,
    creator: str,
) -> bytes:
    """A whole file.

    highdicom holds four bytes of each pixel of each frame of each segment at once: 5 GB for 100 labels on 50
    slices each. So it is given one pixel a slice, which tells what occurs there, and the true ones follow.

    Args:
        labelmap: (I, J, K) uint8.
        occurs: (K, 256) which values each slice has.
        sources: The images.
        segments: Value -> segment, numbered 1, 2, ... in this order. Where none occurs, the first gets an
            empty frame: the standard wants one.
        header: Whose patient and study it is.
        description: SeriesDescription.
        creator: ContentCreatorName.
    """
    values, places = list(segments), [PlanePositionSequence("PATIENT", place) for place in sources.places]
    pixels = occurs[np.argsort(sources.frames)][:, None, None, values]
    drawn = bool(pixels.any())
    shown = slice(None if drawn else 1)
    data = _Segmentation(
        source_images=sources.images,
        pixel_array=pixels[shown],
        plane_positions=places[shown],
        omit_empty_frames=drawn,
        segmentation_type="BINARY",
        segment_descriptions=list(segments.values()),
        series_instance_uid=generate_uid(),
        series_number=_SERIES_NUMBER,
        series_description=_text(description),
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="samloop",
        manufacturer_model_name="samloop",
        software_versions=version("samloop"),
        device_serial_number="none",
        content_label="SEGMENTATION",
        content_description=_text(description),
    )
    at = {_place(places[frame]): k for k, frame in enumerate(sources.frames)}
    frames = [
        (at[_place(group.PlanePositionSequence)], group.SegmentIdentificationSequence[0])
        for group in data.PerFrameFunctionalGroupsSequence
    ]
    data.Columns, data.Rows = labelmap.shape[:2]
    data.SegmentsOverlap = "NO"
    data.PixelData = _packed(
        np.equal(labelmap[:, :, k].T, values[segment.ReferencedSegmentNumber - 1]) for k, segment in frames
    )
    data.SpecificCharacterSet = "ISO_IR 192"
    for name in _COPIED:
        if name in header:
            data[name] = header[name]
    data.ContentCreatorName = _text(creator.replace("=", " "))
    data.SeriesDate = data.InstanceCreationDate = data.ContentDate
    data.SeriesTime = data.InstanceCreationTime = data.ContentTime
    buffer = io.BytesIO()
    data.save_as(buffer, write_like_original=False)
    return buffer.getvalue()


def _place(position: Sequence[Dataset]) -> tuple[float, ...]:
    return tuple(float(mm) for mm in position[0].ImagePositionPatient)


def _packed(masks: Iterator[NDArray[np.bool_]]) -> bytes:
    """(J, I) masks as bits without gaps between frames: eight of any size end with a byte."""
    parts = []
    while eight := list(islice(masks, 8)):
        parts.append(pack_bits(np.array(eight, np.uint8), pad=False))
    content = b"".join(parts)
    return content + b"\0" * (len(content) % 2)


def _text(text: str) -> str:
    """A single long string: no control characters, no backslash, 64 characters at most."""
    plain = "".join(c if c.isprintable() and c != "\\" else " " for c in text)
    return " ".join(plain.split())[:_LONG_STRING]
