"""The images of a series as highdicom wants them: every header without a fault, all on the series' voxels.

It fails on headers without a frame of reference or with gaps, writes a SliceThickness that is not the slices'
distance, and names no source images where it is given other sizes than their headers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pydicom.valuerep import format_number_as_ds

from sam_infer.dicom.frames import read_frames
from sam_infer.dicom.planes import stack
from sam_infer.dicom.series import Series
from sam_infer.errors import InputError
from sam_infer.geometry import LPS_TO_RAS

#: What highdicom reads of the patient and the study. Left empty here: it warns of names by telling them.
_READ = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
)
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The images of a series.

    Args:
        images: One header a slice in k's order, or that of the only file with many frames.
        places: ImagePositionPatient of each of their frames.
        frames: The index of the frame of each k.
    """

    images: list[Dataset]
    places: list[list]
    frames: list[int]


def prepared_sources(series: Series) -> Sources:
    """Headers that hold what highdicom reads and nothing else.

    Raises:
        InputError: (422) When the series' images have no UIDs to refer to.
    """
    count = series.array.shape[2]
    headers: list[Dataset] = [series.header]
    if len(series.slices) == count:
        wanted = ["SOPClassUID", "SOPInstanceUID", "ImagePositionPatient"]
        headers = [pydicom.dcmread(p, stop_before_pixels=True, specific_tags=wanted) for p in series.slices]
    uids = [str(header.get(name) or "") for header in headers for name in ("SOPClassUID", "SOPInstanceUID")]
    if not all([*uids, series.header.get("SeriesInstanceUID"), series.header.get("StudyInstanceUID")]):
        remedy = (
            "its images have no UIDs for a DICOM SEG to refer to (removed on anonymising); give them new ones"
        )
        raise InputError("image", series.slices[0].parent.name, remedy, status=422)
    lps = LPS_TO_RAS @ series.affine
    even = [_decimals(lps[:3, 3] + k * lps[:3, 2]) for k in range(count)]
    if len(headers) == count:
        places = [
            list(header.get("ImagePositionPatient") or place)
            for header, place in zip(headers, even, strict=True)
        ]
        images = [_image(series, header, [place]) for header, place in zip(headers, places, strict=True)]
        return Sources(images=images, places=places, frames=list(range(count)))
    order = stack([frame.plane for frame in read_frames(series.header) if frame.plane is not None])[0]
    places = [even[k] for k in np.argsort(order)]
    return Sources(images=[_image(series, headers[0], places)], places=places, frames=order)


def _image(series: Series, header: Dataset, places: Sequence[list]) -> Dataset:
    """One file; ``places`` has the ImagePositionPatient of each of its frames."""
    source, image = series.header, Dataset()
    for name in _READ:
        setattr(image, name, "")
    image.SOPClassUID, image.SOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    image.StudyInstanceUID, image.SeriesInstanceUID = source.StudyInstanceUID, source.SeriesInstanceUID
    image.FrameOfReferenceUID = source.get("FrameOfReferenceUID") or generate_uid(
        entropy_srcs=[str(source.SeriesInstanceUID), "frame of reference"]
    )
    image.Columns = image.Rows = 1  # see `sam_infer.dicom.segfile.encoded`
    if source.get(_LOSSY[0]) == "01" and all(source.get(name) for name in _LOSSY):
        for name in _LOSSY:
            image[name] = source[name]
    lps = (LPS_TO_RAS @ series.affine)[:3, :3]
    across, down, distance = np.linalg.norm(lps, axis=0)
    single = len(places) == 1
    measures, orientation = (image, image) if single else (Dataset(), Dataset())
    measures.PixelSpacing = _decimals([down, across])
    measures.SliceThickness = measures.SpacingBetweenSlices = _decimals([distance])[0]
    orientation.ImageOrientationPatient = _decimals([*(lps[:, 0] / across), *(lps[:, 1] / down)])
    if single:
        image.ImagePositionPatient = places[0]
        return image
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    image.NumberOfFrames, image.SharedFunctionalGroupsSequence = len(places), [shared]
    image.PerFrameFunctionalGroupsSequence = [_placed(place) for place in places]
    return image


def _placed(place: list) -> Dataset:
    """The functional groups of one frame."""
    group, position = Dataset(), Dataset()
    position.ImagePositionPatient = place
    group.PlanePositionSequence = [position]
    return group


def _decimals(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    """Numbers as DICOM writes them, in 16 characters at most."""
    return [format_number_as_ds(float(value)) for value in values]
