"""Windows: from stored values (HU, MR units, 8-bit grey) to the 0..1 that a model reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_infer.errors import InputError
from sam_infer.types import FloatArray

#: A volume with values this low holds air in Hounsfield units: it is taken for CT.
CT_AIR_HU = -500.0
PERCENTILES = (0.5, 99.5)
#: Levels and widths up to this, and widths down to its inverse, are safe to compute with in float32.
LARGEST = 1e30


@dataclass(frozen=True, kw_only=True)
class Window:
    """An intensity window.

    Args:
        level: Centre, in the image's units.
        width: Width, in the image's units, greater than 0.
    """

    level: float
    width: float

    def __post_init__(self) -> None:
        if not abs(self.level) <= LARGEST:
            raise InputError(
                "window_level", self.level, f"send a level of at most {LARGEST:g} either way, in image units"
            )
        if not 1 / LARGEST <= self.width <= LARGEST:
            raise InputError(
                "window_width",
                self.width,
                f"send a width greater than 0 and at most {LARGEST:g}, in image units",
            )

    def apply(self, image: NDArray) -> FloatArray:
        """Map ``level - width/2 .. level + width/2`` to 0..1, clipped; any shape in, float32 out."""
        low = self.level - self.width / 2
        out = np.subtract(image, np.float32(low), dtype=np.float32)
        out *= np.float32(1.0 / self.width)
        return np.clip(out, 0.0, 1.0, out=out)


#: 0..255 to 0..1: what an 8-bit photograph or radiograph already is.
EIGHT_BIT = Window(level=127.5, width=255.0)


def percentile_window(values: NDArray, *, limit: int = 500_000) -> Window:
    """The window from the 0.5th to the 99.5th percentile of an image, for when nothing else is known.

    Args:
        values: Any shape, any units. Larger arrays are sampled evenly down to about ``limit`` values.
        limit: How many values are looked at.
    """
    flat = values.reshape(-1) if values.flags.c_contiguous or values.flags.f_contiguous else values.ravel()
    if flat.size > limit:
        flat = flat[:: flat.size // limit]
    low, high = np.percentile(flat.astype(np.float32), PERCENTILES).clip(-LARGEST / 2, LARGEST / 2)
    width = float(high - low)
    return Window(level=float((low + high) / 2), width=width if width > 1 / LARGEST else 1.0)


def choose_window(
    values: NDArray, *, requested: Window | None = None, ct: Window | None = None, other: Window | None = None
) -> Window:
    """Choose the window of an image: the request's, else the project's for its kind, else percentiles.

    Args:
        values: The whole image, any shape; uint8 is taken for a picture that is already windowed.
        requested: The window a client sent.
        ct: The project's window for CT, used where the image holds air in HU (`CT_AIR_HU`).
        other: The project's window for everything else; None = percentiles.
    """
    if requested is not None:
        return requested
    if values.dtype == np.uint8:
        return EIGHT_BIT
    if ct is not None and float(values.min()) <= CT_AIR_HU:
        return ct
    return other if other is not None else percentile_window(values)
