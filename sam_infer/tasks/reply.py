"""The file of a reply: a label map, or the part of it that matters, in the format that a client asked for."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask
from numpy.typing import NDArray

from sam_infer.errors import InputError
from sam_infer.geometry import Region, filled_region
from sam_infer.prompts.request import parse_flag
from sam_infer.types import BoolArray
from sam_infer.volumes import Image, labelmap_parts


@dataclass(frozen=True, kw_only=True)
class LabelmapFile:
    """A label map as a file that is in memory, and on disk only for whoever needs a path.

    Args:
        kind: Its extension, such as ".nrrd".
        parts: Its content, in order.
        uncertainty: The uncertainty map of the label map, as a file of the same kind on the same grid: uint8,
            0 = certain to 255; None where it was not asked for.
    """

    kind: str
    parts: tuple[bytes | memoryview, ...]
    uncertainty: LabelmapFile | None = None

    def write(self) -> str:
        """Write it to a temporary file; whoever asked removes it.

        Returns:
            Path of the file.
        """
        handle, path = tempfile.mkstemp(prefix="samloop-", suffix=self.kind)
        with os.fdopen(handle, "wb") as file:
            file.writelines(self.parts)
        return path


class LabelmapTask(InferTask):
    """A MONAI Label task that answers with a label map: as a path to MONAI Label, in memory to the server."""

    @abstractmethod
    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """The label map, None where there is none to send, and the reply's JSON."""

    def fingerprint(self) -> str:
        """Changes whenever the same request on the same image could be answered otherwise; "" = unknown.

        Raises:
            InputError: (409) While there is no model to answer with.
        """
        return ""

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Path of the label map's file, which the caller removes, or None; and the reply's JSON."""
        file, params = self.answer(request)
        return file.write() if file is not None else None, params


def make_reply(
    labelmap: NDArray[np.uint8],
    image: Image,
    request: Mapping[str, Any],
    *,
    slices: Iterable[int] | None = None,
    existing: BoolArray | None = None,
    uncertainty: NDArray[np.uint8] | None = None,
) -> tuple[LabelmapFile | None, dict[str, Any]]:
    """The file of a label map, and what the reply's JSON says of it.

    Args:
        labelmap: (I, J, K) uint8 in the image's voxel order.
        image: The image that it lies on.
        request: ``result_extension`` (".nrrd", ".nii.gz", ".nii", ".png"; default ".png" for a picture and
            ".nii.gz" for a volume), ``result_compress`` (false = raw NRRD, as OHIF asks),
            ``result_region`` (true = only the box that holds something, or what differs from ``existing``)
            and ``output_uncertainty``, which only a model that makes such a map can be asked for.
        slices: Slices that may hold something; None = all. The others are neither looked at nor compressed.
        existing: (I, J, K) bool, the mask that the client sent along and the label map continues.
        uncertainty: (I, J, K) uint8, sent along with the label map; None where there is none.

    Returns:
        The file, and ``empty``; with ``result_region`` also ``region``: ``low`` and ``high`` as voxels of the
        image, both ends included. Where nothing is to be told, file and ``region`` are None.

    Raises:
        InputError: When the extension cannot hold the label map, a flag is neither true nor false, or an
            uncertainty map is asked for that there is not.
    """
    if uncertainty is None and parse_flag("output_uncertainty", request.get("output_uncertainty")):
        raise InputError(
            "output_uncertainty", True, "this model makes no uncertainty map; leave it out, or ask unet"
        )
    kind = str(request.get("result_extension") or (".png" if image.flat else ".nii.gz"))
    kind = kind if kind.startswith(".") else f".{kind}"
    compress = parse_flag("result_compress", request.get("result_compress"), default=True)
    slices = range(labelmap.shape[2]) if slices is None else sorted(slices)
    filled = filled_region(labelmap, slices)
    facts: dict[str, Any] = {"empty": filled is None}
    affine = image.affine
    if parse_flag("result_region", request.get("result_region")):
        if existing is not None:
            filled = filled_region(labelmap, slices, other=existing)
        facts["region"] = None
        if filled is None:
            return None, facts
        facts["region"] = {"low": list(filled.low), "high": list(filled.high)}
        uncertainty = None if uncertainty is None else filled.cut(uncertainty)
        labelmap, affine = filled.cut(labelmap), filled.affine(affine)
        filled = Region(low=(0, 0, 0), high=(0, 0, labelmap.shape[2] - 1))
    parts = labelmap_parts(
        labelmap, affine, kind, compress=compress, slices=range(0) if filled is None else filled.slices
    )
    beside = None
    if uncertainty is not None:
        beside = LabelmapFile(
            kind=kind, parts=tuple(labelmap_parts(uncertainty, affine, kind, compress=compress))
        )
    return LabelmapFile(kind=kind, parts=tuple(parts), uncertainty=beside), facts
