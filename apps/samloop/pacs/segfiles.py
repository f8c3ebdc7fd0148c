"""Segmentations of the PACS as label maps on their images, with the project's values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.samloop.pacs.dicomweb import Dicomweb
from apps.samloop.pacs.files import SeriesFiles
from apps.samloop.pacs.labelnames import LabelNames
from apps.samloop.pacs.refusals import NoVolumeError, Refusals
from apps.samloop.pacs.segs import SegFacts
from sam_infer.dicom.seg import read_seg, write_seg
from sam_infer.dicom.series import Series
from sam_infer.errors import InputError
from sam_infer.files import write_atomic
from sam_infer.volumes import labelmap_bytes

#: Who a DICOM SEG says it is from, where nobody is known.
_MADE_BY = "samloop"
logger = logging.getLogger(__name__)


class SegFiles:
    """Fetches segmentations and lays them on their images' voxels; what was made can be made again.

    Args:
        pacs: Where they come from.
        refusals: Where it is noted that one cannot be used.
        folder: Where label maps are kept.
        names: The project's labels.
    """

    def __init__(self, pacs: Dicomweb, refusals: Refusals, folder: Path, names: LabelNames) -> None:
        self._pacs = pacs
        self._refusals = refusals
        self._folder = folder
        self._files = SeriesFiles(pacs, folder)
        self._names = names

    def path(self, image_id: str, facts: SegFacts) -> Path:
        """Where the label map of a segmentation is, or will be; named as its image."""
        return self._folder / facts.instance / f"{image_id}.nii.gz"

    def info(self, facts: SegFacts) -> dict[str, Any]:
        """What is told of a segmentation: its ``segments``, and those ``unknown`` to the project."""
        return {"segments": list(facts.names), "unknown": self._names.unknown(facts.names)}

    def fetch(self, image_id: str, facts: SegFacts, series: Callable[[], Series]) -> Path:
        """The label map of a segmentation.

        Args:
            image_id: Its image.
            facts: What is known of it.
            series: Gives the image's series.

        Raises:
            NoVolumeError: When the segmentation, or its image, cannot be used; that is remembered.
            UnavailableError: When the PACS does not answer.
        """
        path, entry = self.path(image_id, facts), facts.entry
        with self._files.locked(facts.instance):
            if path.is_file():
                return path
            reason = self._refusals.reason(entry)
            if reason is not None:
                raise NoVolumeError(facts.seg, reason)
            of_image = series()
            with self._files.scratch(facts.instance) as scratch:
                (file,) = self._pacs.download(entry, scratch, instance=facts.instance)
                try:
                    labelmap, names = read_seg(file, of_image, wanted=self._names.knows)
                except InputError as error:
                    reason = str(error).partition(": ")[2]
                    self._refusals.add(entry, reason)
                    raise NoVolumeError(facts.seg, reason) from error
            unknown = self._names.unknown(names.values())
            if unknown:
                logger.warning(
                    "Segments of %s without a label of the project: %s", facts.seg, ", ".join(unknown)
                )
            indices = np.zeros(256, np.uint8)
            for value, name in names.items():
                indices[value] = self._names.index(name) or 0
            content = labelmap_bytes(np.asfortranarray(indices[labelmap]), of_image.affine, ".nii.gz")
            write_atomic(path, content)
        return path

    def forget(self, image_id: str) -> None:
        """Remove the label maps of an image, which has changed."""
        for path in self._folder.glob(f"*/{image_id}.nii.gz"):
            path.unlink(missing_ok=True)


def load_writer() -> None:
    """Load what writes DICOM SEG, which takes seconds, before somebody who accepts a label waits for it."""
    import sam_infer.dicom.segfile  # noqa: F401


def labelled(
    labelmap: NDArray[np.integer], series: Series, names: Mapping[int, str], info: Mapping[str, Any]
) -> bytes:
    """A label map as DICOM SEG.

    Args:
        labelmap: (I, J, K) integers on the voxels of the series, 0 = nothing.
        series: The images that it belongs to.
        names: Value -> label name.
        info: Who made it, ``user``, and with what, ``model``.
    """
    return write_seg(
        np.asfortranarray(labelmap, np.uint8),
        series,
        names=names,
        description=_MADE_BY,
        creator=str(info.get("user") or _MADE_BY),
        algorithm=str(info["model"]) if info.get("model") else None,
    )
