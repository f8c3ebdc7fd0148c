"""The file of a reply: the label map in the format that the client asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_infer.volumes import Image, labelmap_bytes


def write_reply(labelmap: NDArray[np.uint8], image: Image, request: Mapping[str, Any]) -> str:
    """Write a label map to a temporary file; whoever sends the reply removes it.

    Args:
        labelmap: (I, J, K) uint8 in the image's voxel order.
        image: The image that it lies on.
        request: ``result_extension`` (".nrrd", ".nii.gz", ".nii", ".png"; default ".png" for a picture and
            ".nii.gz" for a volume) and ``result_compress`` (false = raw NRRD, as OHIF asks).

    Returns:
        Path of the file.

    Raises:
        InputError: When the extension cannot hold the label map.
    """
    kind = str(request.get("result_extension") or (".png" if image.flat else ".nii.gz"))
    kind = kind if kind.startswith(".") else f".{kind}"
    compress = request.get("result_compress", True) not in (False, "false", 0)
    content = labelmap_bytes(labelmap, image.affine, kind, compress=compress)
    handle, path = tempfile.mkstemp(prefix="samloop-", suffix=kind)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return path
