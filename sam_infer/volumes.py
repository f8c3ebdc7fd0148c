"""Reading images, reading and writing label maps: NIfTI, NRRD, PNG, JPEG.

No image is reoriented: a click's (i, j, k) and a mask's voxels are those of the image file, so whatever a
viewer opens beside the reply lies on it. Label maps are turned onto their image.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image as PilImage

from sam_infer.errors import InputError
from sam_infer.formats.nifti import read_nifti
from sam_infer.formats.nrrd import read_nrrd
from sam_infer.formats.picture import read_picture
from sam_infer.formats.stored import Stored, TooLargeError, TooManyVoxelsError
from sam_infer.geometry import LPS_TO_RAS, SAME_PLACE, is_regular, turned_onto

NIFTI = (".nii.gz", ".nii")
NRRD = (".seg.nrrd", ".nrrd")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
EXTENSIONS = NIFTI + NRRD + PICTURES
_EMPTY = memoryview(bytes(1 << 20))
_LARGEST_LABEL = 2**31 - 1
_NIFTI_SIDE = 2**15 - 1
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
        placed: False where the file says nothing of its place in the world.
        transient: True for an image that a client sent along: nothing of it is written to disk.
    """

    array: NDArray
    affine: NDArray[np.float64]
    key: tuple
    flat: bool
    placed: bool = True
    transient: bool = False

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

    Returns:
        The image, of a voxel type that torch knows and without NaN or infinity.

    Raises:
        InputError: (422) When the file is not a readable image of 2 or 3 dimensions; (413) when it is larger
            than `sam_infer.formats.stored.MAX_BYTES` or `sam_infer.formats.picture.MAX_PIXELS`.
    """
    image = _read(Path(path), argument)
    array = image.array
    if array.dtype.kind == "f" or array.dtype.itemsize == 8:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    return replace(image, array=array)


def _read(path: Path, argument: str, *, voxels: int | None = None) -> Image:
    """An image with its voxels as stored, in the machine's byte order; errors as `read_image`.

    Raises:
        TooManyVoxelsError: When it is a volume whose header tells of more than ``voxels``.
    """
    kind = extension(path)
    if not kind:
        raise InputError(argument, path.name, _REMEDY, status=415)
    read = partial(read_nifti if kind in NIFTI else read_nrrd, voxels=voxels)
    try:
        key = file_key(path)
        stored = read_picture(path) if kind in PICTURES else read(path)
        array = _checked(stored.array)
    except TooManyVoxelsError:
        raise
    except TooLargeError as error:
        raise InputError(argument, path.name, str(error), status=413) from error
    except Exception as error:  # whatever a decoder makes of a damaged file is the file's fault
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise InputError(argument, path.name, f"cannot be read ({reason}); {_REMEDY}", status=422) from error
    affine, placed = _placed(stored)
    return Image(array=array, affine=affine, key=key, flat=kind in PICTURES, placed=placed)


def _checked(array: NDArray) -> NDArray:
    """An (I, J, K) array, or (I, J, K, 3) uint8, in the machine's byte order."""
    if array.ndim != 3 and not (array.ndim == 4 and array.shape[-1] == 3 and array.dtype == np.uint8):
        raise ValueError(f"shape {array.shape} is neither 2D, 3D nor 8-bit RGB; several channels")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _placed(stored: Stored) -> tuple[NDArray[np.float64], bool]:
    """A regular affine, and whether the file means it: one that is the identity is a writer's default."""
    if not is_regular(stored.affine):
        return LPS_TO_RAS.copy(), False
    default = any(np.allclose(stored.affine, identity) for identity in (np.eye(4), LPS_TO_RAS))
    return stored.affine, stored.placed and not default


def empty_labelmap(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A zeroed (I, J, K) uint8 array, Fortran ordered so that files are written without a copy."""
    return np.zeros(shape, np.uint8, order="F")


def read_labelmap(path: Path | str, image: Image, *, argument: str = "label") -> NDArray[np.integer]:
    """Read the label map of an image onto its voxels.

    A file whose axes are permuted or flipped, and whose place in the world is the image's, is turned. A file
    that says nothing of its place, and any file for an image that says nothing of its own, is taken by shape.

    Args:
        path: The file.
        image: The image that it belongs to.
        argument: What the client called it, for errors.

    Returns:
        (I, J, K) integers, in the image's voxel order.

    Raises:
        InputError: (422) When it cannot be read, is not integer-valued, has another shape or lies elsewhere.
    """
    return fit_labelmap(path, image, argument=argument)[0]


def fit_labelmap(
    path: Path | str, image: Image, *, argument: str = "label"
) -> tuple[NDArray[np.integer], bool]:
    """Read a label map as `read_labelmap`, and tell whether the file itself lies on the image.

    Returns:
        (I, J, K) integers, in the image's voxel order; and False where the file has another axis order or
        another place, so that it must be written anew on the image's affine to lie on it in a viewer.
    """

    def other(shape: tuple[int, ...]) -> InputError:
        remedy = f"the label must have the image's shape {image.shape} (I, J, K) and one channel"
        return InputError(argument, shape, remedy, status=422)

    try:
        label = _read(Path(path), argument, voxels=math.prod(image.shape))
    except TooManyVoxelsError as error:
        raise other(error.shape) from None
    turned, apart = label.array, float("inf")
    if label.array.ndim == 3:
        turned, apart = turned_onto(label.array, label.affine, target=image.affine, shape=image.shape)
    told = label.placed and not image.flat
    array = turned if told and apart <= SAME_PLACE else label.array
    if array.shape != image.shape:
        raise other(array.shape)
    if told and image.placed and apart > SAME_PLACE:
        raise InputError(
            argument,
            Path(path).name,
            "the label lies elsewhere in space than the image; resample it onto the image's voxels and save "
            "it with the image's affine",
            status=422,
        )
    if array.dtype.kind == "f" and not np.array_equal(np.rint(array), array):
        raise InputError(argument, Path(path).name, "label values must be whole numbers", status=422)
    low, high = array.min().item(), array.max().item()
    if low < 0 or high > _LARGEST_LABEL:
        value = low if low < 0 else high
        raise InputError(argument, value, f"label values must be 0 to {_LARGEST_LABEL}", status=422)
    if array.dtype.kind == "f" or array.dtype.itemsize == 8:
        array = array.astype(np.int32)
    return np.asfortranarray(array), label.flat or (turned is label.array and apart <= SAME_PLACE)


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
    return b"".join(labelmap_parts(labelmap, affine, kind, compress=compress))


def labelmap_parts(
    labelmap: NDArray[np.uint8],
    affine: NDArray[np.float64],
    kind: str,
    *,
    compress: bool = True,
    slices: range | None = None,
) -> list[bytes | memoryview]:
    """`labelmap_bytes` in pieces, so that what is empty is neither copied nor looked at.

    Args:
        labelmap: As for `labelmap_bytes`.
        affine: As for `labelmap_bytes`.
        kind: As for `labelmap_bytes`.
        compress: As for `labelmap_bytes`.
        slices: The slices k beyond which all is 0; None = all may hold something.

    Raises:
        InputError: When the kind cannot hold this label map.
    """
    if kind == ".nrrd":
        header = _nrrd_header(labelmap.shape, affine, "gzip" if compress else "raw")
        voxels = _voxels(labelmap, slices)
        return [header, _gzip(voxels)] if compress else [header, *voxels]
    if kind in NIFTI:
        if max(labelmap.shape) > _NIFTI_SIDE:
            remedy = f"NIfTI holds {_NIFTI_SIDE} voxels along an axis at most; ask for .nrrd"
            raise InputError("result_extension", kind, remedy)
        parts = [_nifti_header(labelmap.shape, affine), *_voxels(labelmap, slices)]
        return [_gzip(parts)] if kind == ".nii.gz" else parts
    if kind == ".png" and labelmap.shape[2] == 1:
        buffer = io.BytesIO()
        PilImage.fromarray(np.ascontiguousarray(labelmap[:, :, 0].T)).save(buffer, "PNG", compress_level=1)
        return [buffer.getvalue()]
    raise InputError(
        "result_extension", kind, 'ask for ".nrrd", ".nii.gz", ".nii" or, for a 2D image, ".png"'
    )


def _voxels(labelmap: NDArray[np.uint8], slices: range | None) -> list[bytes | memoryview]:
    """The voxels, first axis fastest; one piece of zeros stands for all that lies beyond ``slices``."""
    first, last = (slices.start, slices.stop) if slices is not None else (0, labelmap.shape[2])
    area = labelmap.shape[0] * labelmap.shape[1]
    filled = np.ascontiguousarray(labelmap[:, :, first:last].T).data.cast("B") if last > first else b""
    return [*_zeros(area * first), filled, *_zeros(area * (labelmap.shape[2] - max(last, first)))]


def _zeros(count: int) -> list[memoryview]:
    whole, rest = divmod(count, len(_EMPTY))
    return [_EMPTY] * whole + [_EMPTY[:rest]]


def _gzip(parts: list[bytes | memoryview]) -> bytes:
    packer = isal_zlib.compressobj(1, wbits=isal_zlib.MAX_WBITS + 16)
    return b"".join([*(packer.compress(part) for part in parts), packer.flush()])


def _nifti_header(shape: tuple[int, ...], affine: NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()[:-1]
    header = nib.Nifti1Header(content[: nib.Nifti1Header.sizeof_hdr])
    header.set_data_shape(shape)
    return header.binaryblock + content[nib.Nifti1Header.sizeof_hdr :]


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
