"""PNG, JPEG, BMP and TIFF; pixels as large as ITK takes them for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from sam_infer.formats.stored import Stored, TooLargeError
from sam_infer.geometry import LPS_TO_RAS

#: Pixels of a picture at most.
MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_INCH, _CENTIMETRE = 25.4, 10.0


def read_picture(path: Path) -> Stored:
    """Read a picture as (W, H, 1), or (W, H, 1, 3) where it has colours; never called placed.

    Raises:
        TooLargeError: When it has more than `MAX_PIXELS`.
    """
    try:
        picture = PilImage.open(path, formats=_FORMATS)
    except PilImage.DecompressionBombError as error:
        raise TooLargeError(f"{error}; send at most {MAX_PIXELS} pixels") from error
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise TooLargeError(
                f"has {picture.width} x {picture.height} pixels; send at most {MAX_PIXELS} pixels"
            )
        if picture.mode in ("1", "LA", "La"):
            array = np.asarray(picture.convert("L"))
        elif picture.mode in ("P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "PA", "RGBX"):
            array = np.asarray(picture.convert("RGB"))
        else:
            array = np.asarray(picture)
        affine = LPS_TO_RAS @ np.diag([*_pixel_size(picture), 1.0, 1.0])
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = np.ascontiguousarray(array[..., 0])
    return Stored(array=np.swapaxes(array, 0, 1)[:, :, None], affine=affine, placed=False)


def _pixel_size(picture: PilImage.Image) -> NDArray[np.float64]:
    """(width, height) of a pixel in mm: of JPEG's JFIF density and TIFF's resolution; else 1, as in ITK."""
    length, density = 1.0, None
    if picture.format in ("JPEG", "MPO"):
        length = {1: _INCH, 2: _CENTIMETRE}.get(picture.info.get("jfif_unit", 0), 0.0)
        density = picture.info.get("jfif_density") if length else None
    elif picture.format == "TIFF" and "resolution" not in picture.info:  # Pillow's word for "no unit"
        length, density = _INCH, picture.info.get("dpi")
    if density is None or min(density) <= 0:
        return np.ones(2)
    return length / np.asarray(density, np.float64)
