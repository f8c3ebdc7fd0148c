"""What headers say of each frame: its place and its scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pydicom.dataset import Dataset

from sam_infer.dicom.planes import NotVolumeError, Plane, plane_of

#: Gives a functional group of one frame by the name of its sequence; an empty one where there is none.
Groups = Callable[[str], Dataset]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One slice before it is decoded.

    Args:
        plane: Its place; None where the image has none.
        slope: From stored values to those of the modality.
        intercept: As ``slope``.
    """

    plane: Plane | None
    slope: float
    intercept: float


def read_frames(header: Dataset) -> list[Frame]:
    """The frames of a header, in the file's order; errors as `functional_groups` and `plane_of`."""
    return [frame_of(groups) for groups in functional_groups(header)]


def functional_groups(header: Dataset) -> list[Groups]:
    """What a header says of each frame, be it of one image a file or of many.

    Raises:
        NotVolumeError: When it is of several frames and does not say it of each.
    """
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    each = header.get("PerFrameFunctionalGroupsSequence")
    count = int(header.get("NumberOfFrames") or 1)
    if each is None:
        if count > 1:
            raise NotVolumeError(
                f"not a volume: a file of {count} frames without a place for each (a film, or a dose grid); "
                "export it as an enhanced image or as one file a slice, or send single pictures"
            )
        return [lambda _: header]
    if len(each) != count:
        raise ValueError(f"{len(each)} of {count} frames are described")
    return [partial(_group, item, shared[0]) for item in each]


def frame_of(groups: Groups) -> Frame:
    """One frame from what is said of it; errors as `plane_of`."""
    position = groups("PlanePositionSequence").get("ImagePositionPatient")
    orientation = groups("PlaneOrientationSequence").get("ImageOrientationPatient")
    value = groups("PixelValueTransformationSequence")
    plane = None
    if position is not None and orientation is not None:
        spacing = groups("PixelMeasuresSequence").get("PixelSpacing")
        plane = plane_of(position=position, orientation=orientation, spacing=spacing)
    slope, intercept = value.get("RescaleSlope"), value.get("RescaleIntercept")
    return Frame(
        plane=plane,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
    )


def _group(item: Dataset, shared: Dataset, name: str) -> Dataset:
    for holder in (item, shared):
        if holder.get(name):
            return holder[name][0]
    return Dataset()
