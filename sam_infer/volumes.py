"""Reading images and writing label maps: NIfTI, NRRD, PNG, JPEG; voxels stay in the file's own order.

No reader reorients anything: a click's (i, j, k) and a mask's voxels are those of the file, so whatever a
viewer opens beside the reply lies on it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
from isal import igzip
from numpy.typing import NDArray
from PIL import Image as PilImage

from sam_infer.errors import InputError

#: LPS (DICOM, NRRD, ITK) to RAS (NIfTI, 3D Slicer): the first two world axes change sign.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
NIFTI = (".nii.gz", ".nii")
NRRD = (".seg.nrrd", ".nrrd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
EXTENSIONS = NIFTI + NRRD + PICTURES
_REMEDY = f"send a readable image file ({', '.join(EXTENSIONS)}), 2D or 3D, with one channel or RGB"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A 2D image or a volume with its place in the world.

    Args:
        array: (I, J, K) of the stored type, or (I, J, K, 3) uint8 for RGB; a 2D image of W columns and
            H rows is (W, H, 1).
        affine: (4, 4) float64, voxel (i, j, k) to world RAS in mm.
        key: Identity of the file's content (path, time, size): part of every cache key.
        flat: True for picture files (PNG, JPEG), which have no third dimension.
    """

    array: NDArray
    affine: NDArray[np.float64]
    key: tuple
    flat: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I, J, K)."""
        i, j, k = self.array.shape[:3]
        return (i, j, k)


def extension(path: Path | str) -> str:
    """The known extension of a file name (".nii.gz", ".png", ...), "" where it is none of `EXTENSIONS`."""
    name = Path(path).name.lower()
    return next((e for e in EXTENSIONS if name.endswith(e)), "")


def stem(path: Path | str) -> str:
    """File name without its known extension."""
    name = Path(path).name
    known = extension(path)
    return name[: -len(known)] if known else name


def file_key(path: Path) -> tuple:
    """Changes whenever the file changes: (path, modification time in ns, size, inode)."""
    stat = path.stat()
    return (str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


def read_image(path: Path | str, *, argument: str = "image") -> Image:
    """Read an image file without reorienting it.

    Args:
        path: The file.
        argument: What the client called it, for errors.

    Raises:
        InputError: (422) When the file is not a readable image of 2 or 3 dimensions.
    """
    path = Path(path)
    kind = extension(path)
    try:
        key = file_key(path)
        if kind in NIFTI:
            array, affine = _read_nifti(path)
        elif kind in NRRD:
            array, affine = _read_nrrd(path)
        elif kind in PICTURES:
            array, affine = _read_picture(path)
        else:
            raise InputError(argument, path.name, _REMEDY, status=415)
    except InputError:
        raise
    except Exception as error:  # whatever a decoder makes of a damaged file is the file's fault
        reason = str(error) or type(error).__name__
        raise InputError(argument, path.name, f"cannot be read ({reason}); {_REMEDY}", status=422) from error
    if 0 in array.shape:
        raise InputError(argument, path.name, f"has no voxels (shape {array.shape}); {_REMEDY}", status=422)
    return Image(array=array, affine=affine, key=key, flat=kind in PICTURES)


def _read_nifti(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = igzip.decompress(content)
    image = nib.Nifti1Image.from_bytes(content)
    array = np.asanyarray(image.dataobj)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    return _checked(array), np.asarray(image.affine, np.float64)


def _read_nrrd(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    array, header = nrrd.read(str(path), index_order="F")
    directions = np.asarray(header.get("space directions", np.eye(array.ndim)), np.float64)
    spatial = np.isfinite(directions).all(axis=1)
    if array.ndim == 4 and not spatial[0] and array.shape[0] == 1:
        array, directions, spatial = array[0], directions[1:], spatial[1:]
    if array.ndim == 2:
        array = array[..., None]
    affine = np.eye(4)
    vectors = directions[spatial]
    affine[: vectors.shape[1], : len(vectors)] = vectors.T
    origin = np.asarray(header.get("space origin", [0.0] * vectors.shape[1]), np.float64)
    affine[: len(origin), 3] = origin
    space = str(header.get("space", "left-posterior-superior")).lower()
    if space in ("left-posterior-superior", "lps"):
        affine = LPS_TO_RAS @ affine
    elif space in ("left-anterior-superior", "las"):
        affine = np.diag([-1.0, 1.0, 1.0, 1.0]) @ affine
    return _checked(array), affine


def _read_picture(path: Path) -> tuple[NDArray, NDArray[np.float64]]:
    with PilImage.open(path) as picture:
        if picture.mode in ("1", "LA", "La"):
            array = np.asarray(picture.convert("L"))
        elif picture.mode in ("P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "PA", "RGBX"):
            array = np.asarray(picture.convert("RGB"))
        else:
            array = np.asarray(picture)
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]
    return _checked(np.swapaxes(array, 0, 1)[:, :, None]), LPS_TO_RAS.copy()


def _checked(array: NDArray) -> NDArray:
    """A real-valued (I, J, K) array, or (I, J, K, 3) uint8, of a type that torch knows, Fortran ordered."""
    if array.dtype.fields is not None and set(array.dtype.names or ()) >= {"R", "G", "B"}:
        array = np.stack([array[c] for c in "RGB"], axis=-1)
    rgb = array.ndim == 4 and array.shape[-1] == 3 and array.dtype == np.uint8
    if not rgb and array.ndim != 3:
        raise ValueError(f"shape {array.shape} is neither 2D, 3D nor RGB; several channels or time points")
    if array.dtype.kind not in "iufb":
        raise ValueError(f"voxel type {array.dtype} is not a real number")
    if array.dtype.kind == "f" or array.dtype.itemsize == 8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def empty_labelmap(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A zeroed (I, J, K) uint8 array, Fortran ordered so that files are written without a copy."""
    return np.zeros(shape, np.uint8, order="F")


def read_labelmap(path: Path | str, image: Image, *, argument: str = "label") -> NDArray[np.integer]:
    """Read the label map of an image.

    Args:
        path: The file.
        image: The image that it belongs to.
        argument: What the client called it, for errors.

    Returns:
        (I, J, K) integers, in the image's voxel order.

    Raises:
        InputError: (422) When it cannot be read, is not integer-valued or has another shape.
    """
    label = read_image(path, argument=argument)
    array = label.array
    if label.shape != image.shape or array.ndim != 3:
        raise InputError(
            argument,
            array.shape,
            f"the label must have the image's shape {image.shape} (I, J, K) and one channel",
            status=422,
        )
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not np.array_equal(whole, array):
            raise InputError(argument, Path(path).name, "label values must be whole numbers", status=422)
        array = whole.astype(np.int32)
    if array.size and array.min() < 0:
        raise InputError(argument, int(array.min()), "label values must be 0 or more", status=422)
    return array


def labelmap_bytes(
    labelmap: NDArray[np.uint8], affine: NDArray[np.float64], kind: str, *, compress: bool = True
) -> bytes:
    """A label map as the content of a file.

    Args:
        labelmap: (I, J, K) uint8.
        affine: (4, 4) voxel to RAS in mm.
        kind: ".nrrd", ".nii.gz", ".nii", or ".png" (one slice only).
        compress: False writes ".nrrd" with raw encoding, as OHIF asks; other kinds ignore it.

    Raises:
        InputError: When the kind cannot hold this label map.
    """
    if kind == ".nrrd":
        header = _nrrd_header(labelmap.shape, affine, "gzip" if compress else "raw")
        voxels = np.ascontiguousarray(labelmap.T).data.cast("B")
        return header + (igzip.compress(voxels, 1) if compress else bytes(voxels))
    if kind in NIFTI:
        image = nib.Nifti1Image(labelmap, affine)
        image.header.set_xyzt_units("mm")
        content = image.to_bytes()
        return igzip.compress(content, 1) if kind == ".nii.gz" else content
    if kind == ".png" and labelmap.shape[2] == 1:
        buffer = io.BytesIO()
        PilImage.fromarray(np.ascontiguousarray(labelmap[:, :, 0].T)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    raise InputError(
        "result_extension", kind, 'ask for ".nrrd", ".nii.gz", ".nii" or, for a 2D image, ".png"'
    )


def _nrrd_header(shape: tuple[int, ...], affine: NDArray[np.float64], encoding: str) -> bytes:
    lps = LPS_TO_RAS @ affine

    def vector(values: NDArray[np.float64]) -> str:
        return "(" + ",".join(repr(float(v)) for v in values) + ")"

    return (
        "NRRD0004\n"
        "type: unsigned char\n"
        "dimension: 3\n"
        "space: left-posterior-superior\n"
        f"sizes: {shape[0]} {shape[1]} {shape[2]}\n"
        f"space directions: {' '.join(vector(lps[:3, axis]) for axis in range(3))}\n"
        "kinds: domain domain domain\n"
        "endian: little\n"
        f"encoding: {encoding}\n"
        f"space origin: {vector(lps[:3, 3])}\n\n"
    ).encode("ascii")
