"""DICOM SEG files, of any writer, as label maps on the voxels of a series.

Frames are placed by their position and orientation in the patient alone: they may be flipped, turned,
cropped, sparse and in any order, if their pixels are the series' voxels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from sam_infer.dicom.frames import frame_of, functional_groups
from sam_infer.dicom.pixels import stored_frames
from sam_infer.dicom.planes import NotVolumeError, Plane
from sam_infer.dicom.series import SEGMENTATIONS, Series
from sam_infer.errors import InputError
from sam_infer.geometry import SAME_PLACE
from sam_infer.volumes import empty_labelmap

_MOST = 255
_OTHER = "choose the series that it was drawn on"


def read_seg(
    content: bytes | Path, series: Series, *, wanted: Callable[[str], bool] = lambda _: True
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Read a DICOM SEG onto the voxels of the series that it was drawn on.

    Where segments overlap, the one of the highest number wins: viewers draw it on top. Of a fractional
    segment, what reaches half of the maximum counts. Label maps in DICOM (SegmentationType LABELMAP) are
    read too.

    Args:
        content: The file, or what is in it.
        series: What the label map shall lie on.
        wanted: Whether a segment of a name is read; others hide nothing where they overlap.

    Returns:
        (I, J, K) uint8, and value -> SegmentLabel of every segment that the file describes. Values are the
        segment numbers; 1, 2, ... in their order where one is above 255.

    Raises:
        InputError: (422) When it is damaged or no SEG, was drawn on another series or in another frame of
            reference, or its pixels are not the series' voxels.
    """
    shown = content.name if isinstance(content, Path) else f"{len(content)} bytes"
    try:
        data = pydicom.dcmread(content if isinstance(content, Path) else io.BytesIO(content))
        _check_same(data, series)
        segments = _segments(data)
        values = {number: value if wanted(name) else 0 for value, (number, name) in segments.items()}
        return _labelmap(data, series, values), {value: name for value, (_, name) in segments.items()}
    except NotVolumeError as error:
        raise InputError("label", shown, str(error), status=422) from error
    except Exception as error:  # whatever pydicom and numpy make of a damaged file is the file's fault
        reason = str(error) or type(error).__name__
        remedy = f"cannot be read as a DICOM SEG ({reason}); send it again from its source"
        raise InputError("label", shown, remedy, status=422) from error


def referenced_series(dataset: Dataset) -> str | None:
    """The SeriesInstanceUID of the images that a DICOM SEG was drawn on; None where it does not say."""
    for item in dataset.get("ReferencedSeriesSequence") or ():
        if item.get("SeriesInstanceUID"):
            return str(item.SeriesInstanceUID)
    return None


def _check_same(data: Dataset, series: Series) -> None:
    if str(data.get("SOPClassUID")) not in SEGMENTATIONS:
        raise NotVolumeError(
            f"is no DICOM SEG but {data.get('Modality') or 'something else'}; send a DICOM SEG"
        )
    drawn, uid = referenced_series(data), str(series.header.get("SeriesInstanceUID") or "")
    if drawn and uid and drawn != uid:
        raise NotVolumeError(f"the segmentation was drawn on another series ({drawn}, not {uid}); {_OTHER}")
    theirs, ours = (str(header.get("FrameOfReferenceUID") or "") for header in (data, series.header))
    if theirs and ours and theirs != ours:
        raise NotVolumeError(
            f"the segmentation has another frame of reference ({theirs}) than the series ({ours}), so that "
            f"nothing tells where it lies; {_OTHER}, or register the two and resample it"
        )


def _segments(data: Dataset) -> dict[int, tuple[int, str]]:
    """Value -> (segment number, label); number 0 is the background of a label map."""
    items = sorted(data.SegmentSequence, key=lambda item: int(item.SegmentNumber))
    segments = [(int(item.SegmentNumber), str(item.get("SegmentLabel") or "")) for item in items]
    segments = [(number, name or f"segment {number}") for number, name in segments if number > 0]
    if len(segments) > _MOST:
        raise NotVolumeError(f"{len(segments)} segments; {_MOST} at most can be read, so split it")
    renumbered = any(number > _MOST for number, _ in segments)
    return {n if renumbered else number: (number, name) for n, (number, name) in enumerate(segments, 1)}


def _labelmap(data: Dataset, series: Series, values: dict[int, int]) -> NDArray[np.uint8]:
    """The label map; ``values`` gives the value of each segment number."""
    columns, rows, count = series.array.shape[:3]
    labelmap = empty_labelmap((columns, rows, count))
    groups = functional_groups(data)
    places = [frame_of(group).plane for group in groups]
    if any(place is None for place in places):
        raise NotVolumeError(f"its frames have no place in the patient; {_OTHER} with a viewer that keeps it")
    values = {**values, 0: 0}
    if data.get("SegmentationType") == "LABELMAP":
        data.PhotometricInterpretation = "MONOCHROME2"  # colours of a palette are for viewers
        values = {**values, int(data.get("PixelPaddingValue") or 0): 0}
        drawn = (_valued(pixels, values) for pixels in stored_frames(data))
    else:
        numbers = [int(group("SegmentIdentificationSequence").ReferencedSegmentNumber) for group in groups]
        masks = _bits(data, len(groups)) if data.BitsAllocated == 1 else _fractions(data)
        drawn = (mask * np.uint8(_value(n, values)) for n, mask in zip(numbers, masks, strict=True))
    for place, pixels in zip(places, drawn, strict=True):
        if place is not None and pixels.any():
            _put(labelmap, pixels.T, place, series.affine)
    return labelmap


def _value(number: int, values: Mapping[int, int]) -> int:
    if number not in values:
        raise NotVolumeError(f"segment {number} is drawn but not described; export the segmentation anew")
    return values[number]


def _valued(pixels: NDArray, values: Mapping[int, int]) -> NDArray[np.uint8]:
    """(J, I) segment numbers as values."""
    table = np.zeros(int(pixels.max()) + 1, np.uint8)
    for number in np.unique(pixels).tolist():
        table[number] = _value(number, values)
    return table[pixels]


def _bits(data: Dataset, count: int) -> Iterator[NDArray[np.bool_]]:
    """(J, I) masks of bits without gaps between frames, the lowest bit first."""
    content, size = data.PixelData, data.Rows * data.Columns
    if len(content) * 8 < count * size:
        raise ValueError(f"its pixels end after {len(content)} bytes, before its {count} frames do")
    for n in range(count):
        first, last = n * size // 8, -(-(n + 1) * size // 8)
        bits = np.unpackbits(np.frombuffer(content[first:last], np.uint8), bitorder="little")
        yield bits[n * size - first * 8 :][:size].reshape(data.Rows, data.Columns).view(np.bool_)


def _fractions(data: Dataset) -> Iterator[NDArray[np.bool_]]:
    """(J, I) masks of what reaches half of the maximum."""
    most = int(data.get("MaximumFractionalValue") or 255) if data.SegmentationType == "FRACTIONAL" else 1
    for pixels in stored_frames(data):
        yield pixels.astype(np.uint32) * 2 >= most


def _put(
    labelmap: NDArray[np.uint8], pixels: NDArray[np.uint8], place: Plane, affine: NDArray[np.float64]
) -> None:
    """Lay a frame (I, J) on the voxels under it; the higher value wins.

    Raises:
        NotVolumeError: When its pixels are not voxels, or something is drawn beyond them.
    """
    between = np.linalg.inv(affine) @ place.affine()
    steps = np.rint(between[:3, :2]).astype(int)
    start = np.rint(between[:3, 3]).astype(int)
    far = np.array(pixels.shape) - 1
    corners = np.array([[0, 0], [far[0], 0], [0, far[1]], far])
    true = corners @ between[:3, :2].T + between[:3, 3]
    apart = float(np.abs(true - (corners @ steps.T + start)).max())
    if apart > SAME_PLACE or not np.array_equal(np.abs(steps.T @ steps), np.eye(2)):
        raise NotVolumeError(
            "its frames do not lie on the slices of the series (another slice distance, pixel size or "
            f"position: {apart:.2g} voxels apart); resample it onto the series, or {_OTHER}"
        )
    filled = [np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))]
    low, high = [int(of_axis[0]) for of_axis in filled], [int(of_axis[-1]) + 1 for of_axis in filled]
    pixels = pixels[low[0] : high[0], low[1] : high[1]]
    index = []
    for axis in range(3):
        along = int(np.argmax(np.abs(steps[axis])))
        step = int(steps[axis, along])
        index.append(
            start[axis] + step * np.arange(low[along], high[along]) if step else start[axis : axis + 1]
        )
    if any(of_axis.min() < 0 or of_axis.max() >= n for of_axis, n in zip(index, labelmap.shape, strict=True)):
        raise NotVolumeError(f"something is drawn outside the slices of the series; {_OTHER}")
    axes = np.argmax(np.abs(steps), axis=0)
    turned = pixels if axes[0] < axes[1] else pixels.T
    grid = np.ix_(*index)
    labelmap[grid] = np.maximum(labelmap[grid], turned.reshape(labelmap[grid].shape))
