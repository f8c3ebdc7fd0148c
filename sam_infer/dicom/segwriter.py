"""Label maps as DICOM SEG: one binary segment a label, on the frames of the series' own slices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from sam_infer.dicom.segsources import prepared_sources
from sam_infer.dicom.series import Series
from sam_infer.errors import InputError


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
    sources = prepared_sources(series)
    counts = [np.bincount(labelmap[:, :, k].ravel(order="K"), minlength=256) for k in range(shape[2])]
    occurs = np.array(counts) > 0
    occurs[:, 0] = False
    values = np.flatnonzero(occurs.any(axis=0)).tolist() or [min(filter(None, names), default=1)]
    from sam_infer.dicom.segfile import described, encoded

    segments = {
        value: described(number, names.get(value, f"label {value}"), (colors or {}).get(value), algorithm)
        for number, value in enumerate(values, 1)
    }
    return encoded(
        labelmap, occurs, sources, segments, header=series.header, description=description, creator=creator
    )
