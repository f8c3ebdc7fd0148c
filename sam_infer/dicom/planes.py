"""Where slices lie, and whether a set of them is a volume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_infer.geometry import LPS_TO_RAS, SAME_PLACE

#: Directions closer than this, in radians (0.06 degrees), are taken for one: headers are rounded. At 30 cm it
#: makes 0.3 mm; OHIF compares cosines to 0.01, gantries are tilted by half a degree and more.
SAME_DIRECTION = 1e-3
#: Positions closer than this in mm are one place.
_ONE_PLACE = 0.01
#: From two positions alone, nobody sees whether a slice between them is missing.
_FEWEST = 3


class NotVolumeError(ValueError):
    """The slices are no volume; the text says why and what to do, in a clinician's words."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The place of one slice, LPS in mm as DICOM has it.

    Args:
        position: (3,) the centre of the first pixel.
        along: (3,) unit vector in which the column index grows.
        down: (3,) unit vector in which the row index grows.
        spacing: Distance of neighbouring pixels along and down, in mm.
    """

    position: NDArray[np.float64]
    along: NDArray[np.float64]
    down: NDArray[np.float64]
    spacing: tuple[float, float]

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) unit vector along which slices are counted."""
        return np.cross(self.along, self.down)

    def affine(self, distance: float = 1.0) -> NDArray[np.float64]:
        """(4, 4) voxel to RAS in mm of slices on this one, ``distance`` mm apart."""
        lps = np.eye(4)
        lps[:3, 0], lps[:3, 1] = self.along * self.spacing[0], self.down * self.spacing[1]
        lps[:3, 2], lps[:3, 3] = self.normal * distance, self.position
        return LPS_TO_RAS @ lps


def plane_of(
    *, position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float] | None
) -> Plane:
    """A plane from DICOM's attributes.

    Args:
        position: ImagePositionPatient.
        orientation: ImageOrientationPatient.
        spacing: PixelSpacing: between rows, between columns.

    Raises:
        NotVolumeError: When they are no place in the world.
    """
    if spacing is None:
        raise NotVolumeError("the images do not say how large a pixel is (PixelSpacing); export them anew")
    place, cosines = np.array(position, np.float64), np.array(orientation, np.float64)
    rows, columns = (float(mm) for mm in spacing)
    broken = "position, orientation or pixel size in the headers is damaged; export the series anew"
    if place.shape != (3,) or cosines.shape != (6,):
        raise NotVolumeError(broken)
    lengths = np.linalg.norm(cosines.reshape(2, 3), axis=1)
    numbers = np.concatenate([place, cosines, [rows, columns]])
    if not (np.isfinite(numbers).all() and min(rows, columns) > 0 and (abs(lengths - 1) < 0.01).all()):
        raise NotVolumeError(broken)
    along, down = cosines[:3] / lengths[0], cosines[3:] / lengths[1]
    if abs(along @ down) > 0.01:
        raise NotVolumeError(broken)
    return Plane(position=place, along=along, down=down, spacing=(columns, rows))


def stack(planes: Sequence[Plane]) -> tuple[list[int], NDArray[np.float64]]:
    """Order slices into a volume.

    The distance of slices comes from their positions alone. A slice may lie `SAME_PLACE` of that distance
    from where even spacing puts it.

    Args:
        planes: One for each slice, in any order.

    Returns:
        The index of the slice of each k, rising along rows x columns, and (4, 4) voxel to RAS in mm, whose
        axes are perpendicular. A single slice counts as 1 mm thick.

    Raises:
        NotVolumeError: When the slices are no volume.
    """
    first = planes[0]
    _check_alike(planes)
    if len(planes) == 1:
        return [0], first.affine()
    offsets = np.array([plane.position for plane in planes]) - first.position
    heights = offsets @ first.normal
    order = np.argsort(heights, kind="stable")
    _check_places(heights[order])
    if len(planes) < _FEWEST:
        raise NotVolumeError(
            f"too few slices: {len(planes)}, and {_FEWEST} are needed to see that they are evenly spaced and "
            "none is missing; send the whole series, or one slice alone as a 2D image"
        )
    sideways = offsets - heights[:, None] * first.normal
    _check_tilt(sideways[order], heights[order], min(first.spacing))
    _check_spacing(heights[order])
    lowest = planes[int(order[0])]
    distance = float(heights.max() - heights.min()) / (len(planes) - 1)
    return order.tolist(), lowest.affine(distance)


def _check_alike(planes: Sequence[Plane]) -> None:
    axes = np.array([[*plane.along, *plane.down] for plane in planes])
    if np.abs(axes - axes[0]).max() > SAME_DIRECTION:
        count = len({tuple(np.rint(row / 0.01).astype(int)) for row in axes})
        raise NotVolumeError(
            f"mixed orientation: the images lie in {max(count, 2)} different directions (a localizer, or "
            "several stacks in one series); choose a series of parallel slices, or split this one"
        )
    sizes = np.array([plane.spacing for plane in planes])
    if np.abs(sizes / sizes[0] - 1).max() > SAME_DIRECTION:
        raise NotVolumeError("the slices have different pixel sizes; split the series by PixelSpacing")


def _check_places(heights: NDArray[np.float64]) -> None:
    """Refuse several images at one place; ``heights`` (K,) rises."""
    steps = np.diff(heights) > _ONE_PLACE
    counts = np.diff(np.flatnonzero(np.concatenate([[True], steps, [True]])))
    if counts.max() == 1:
        return
    split = "split the series by time point, phase, echo or b-value and choose one"
    if len(counts) == 1:
        raise NotVolumeError(
            f"not a volume: all {len(heights)} images show the same place (a monitoring or perfusion scan, "
            f"or copies of one slice); {split}"
        )
    if len(set(counts.tolist())) == 1:
        raise NotVolumeError(
            f"not a volume: {counts[0]} images at each of {len(counts)} places (a 4D series: time points, "
            f"phases, echoes); {split}"
        )
    at = heights[np.concatenate([[0], np.cumsum(counts)])[:-1][counts > 1]]
    raise NotVolumeError(
        f"duplicate slices: several images lie at the same place ({len(at)} of {len(counts)} places; the "
        f"first is {at[0] - heights[0]:g} mm from the lowest slice); remove the copies, or {split}"
    )


def _check_tilt(sideways: NDArray[np.float64], heights: NDArray[np.float64], pixel: float) -> None:
    """Refuse slices shifted in their plane: (K, 3) and (K,) mm from any slice, by height."""
    extent = heights[-1] - heights[0]
    shifts = sideways - sideways[0]
    if np.linalg.norm(shifts, axis=1).max() <= max(SAME_DIRECTION * extent, SAME_PLACE * pixel):
        return
    straight = np.outer((heights - heights[0]) / extent, shifts[-1])
    if np.linalg.norm(shifts - straight, axis=1).max() > max(SAME_DIRECTION * extent, SAME_PLACE * pixel):
        raise NotVolumeError(
            "the slices are shifted sideways against each other, so they are no straight stack; split the "
            "series where the table or the field of view moved"
        )
    angle = np.degrees(np.arctan2(np.linalg.norm(shifts[-1]), extent))
    raise NotVolumeError(
        f"gantry tilt of {angle:.1f} degrees: the slices are sheared, and distances and shapes would be "
        "wrong; resample the series to a straight volume first (3D Slicer: 'Acquisition geometry "
        "regularization'; dcm2niix does it too), or choose a series without tilt"
    )


def _check_spacing(heights: NDArray[np.float64]) -> None:
    """Refuse gaps and uneven spacing; ``heights`` (K,) rises."""
    even = np.linspace(heights[0], heights[-1], len(heights))
    if np.abs(heights - even).max() <= SAME_PLACE * (even[1] - even[0]):
        return
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    jumps = gaps / usual
    whole = np.rint(jumps)
    if (np.abs(jumps - whole) <= SAME_PLACE).all() and (whole >= 1).all():
        at = int(np.argmax(whole > 1))
        raise NotVolumeError(
            f"missing slices: {int((whole - 1).sum())} of the slices {usual:g} mm apart are not there, the "
            f"first {heights[at] - heights[0] + usual:g} mm above the lowest slice; send the whole series"
        )
    spacings = Counter(np.round(gaps, 2).tolist())
    told = ", ".join(f"{mm:g}" for mm in sorted(spacings)[:5]) + (", ..." if len(spacings) > 5 else "")
    raise NotVolumeError(
        f"irregular slice spacing ({told} mm): a slice may lie {SAME_PLACE:.0%} of the spacing off its "
        "place; split the series where the spacing changes, or resample it to even spacing"
    )
