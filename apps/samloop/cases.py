"""Ground truth of a simulation: found by file stem, laid on the image's voxels, and sent back as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sam_infer.errors import InputError
from sam_infer.types import BoolArray
from sam_infer.volumes import EXTENSIONS, Image, extension, labelmap_bytes, read_labelmap, stem


class CaseError(ValueError):
    """One case cannot be simulated; the others can."""


def truth_files(folder: Path) -> dict[str, Path]:
    """Image files of a folder by stem ("case_1" for case_1.nii.gz); later extensions lose to earlier ones.

    Raises:
        InputError: When it is no folder, or holds no image file.
    """
    if not folder.is_dir():
        raise InputError("truth", str(folder), "no such folder; name the folder of ground truth masks")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda p: (extension(p), p.name)):
        if path.is_file() and extension(path) and not path.name.startswith("."):
            found.setdefault(stem(path), path)
    if not found:
        raise InputError("truth", str(folder), f"holds no mask; known are {', '.join(EXTENSIONS)}")
    return found


def label_indices(labels: object) -> dict[str, int]:
    """Label names and their indices from ``labels`` of ``GET /info/``.

    Args:
        labels: A dict name -> index, or a list of names in the order of their indices, from 1.
    """
    if isinstance(labels, dict):
        found = {str(name): int(index) for name, index in labels.items()}
    elif isinstance(labels, list):
        found = {str(name): n for n, name in enumerate((v for v in labels if v != "background"), 1)}
    else:
        found = {}
    return {name: index for name, index in found.items() if index > 0}


def masks_of(labelmap: NDArray[np.integer], names: dict[str, int]) -> dict[str, BoolArray]:
    """One (I, J, K) bool mask for each of ``names`` (name -> value) that occurs in an (I, J, K) map."""
    return {name: labelmap == value for name, value in names.items() if (labelmap == value).any()}


def merge(
    masks: dict[str, BoolArray], indices: dict[str, int], shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """One label map of several masks; where they overlap the later one wins.

    Args:
        masks: (I, J, K) bool by label name, in the order in which they were drawn.
        indices: Label name to value, 1 to 255.
        shape: (I, J, K).
    """
    labelmap = np.zeros(shape, np.uint8, order="F")
    for name, mask in masks.items():
        labelmap[mask] = indices[name]
    return labelmap


def mask_file(mask: BoolArray, image: Image) -> tuple[str, bytes]:
    """Name and content of a mask to send along with clicks: NRRD, 1 = the object."""
    return "mask.nrrd", labelmap_bytes(np.asfortranarray(mask, np.uint8), image.affine, ".nrrd")


def label_file(image_id: str, labelmap: NDArray[np.uint8], image: Image) -> tuple[str, bytes]:
    """Name and content of a label map to store: 8-bit PNG for a picture, else NIfTI on the image's affine.

    Args:
        image_id: Becomes the file's stem.
        labelmap: (I, J, K) uint8, in the image's voxel order.
        image: The image that it lies on.
    """
    kind = ".png" if image.flat else ".nii.gz"
    return image_id + kind, labelmap_bytes(labelmap, image.affine, kind)


def read_truth(path: Path, image: Image) -> NDArray[np.integer]:
    """Read a ground truth file onto an image's voxels; see `sam_infer.volumes.read_labelmap`.

    Raises:
        CaseError: When it is not a label map of the image.
    """
    try:
        return read_labelmap(path, image, argument="truth")
    except InputError as error:
        raise CaseError(str(error)) from error
