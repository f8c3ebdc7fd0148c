"""Figures of label maps, and what is made of them: means, intervals, failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sam_infer.geometry import tight_box
from sam_infer.types import BoolArray

#: One image's figures, as they are kept: {"dice": {label: ...}, "hd95": {label: ...}, "false": [label, ...]}.
Judged = Mapping[str, Any]
RESAMPLED = 2000
FAILED_BELOW = 0.5


def judge(
    prediction: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    labels: Mapping[str, int],
    *,
    distance: bool = True,
) -> dict[str, Any]:
    """Judge one image at its own resolution.

    Args:
        prediction: (H, W) label values.
        truth: (H, W) label values.
        labels: Label name to value.
        distance: Whether HD95 is wanted.

    Returns:
        ``dice`` of each label that occurs in the truth (0 where it was not found); ``hd95`` in pixels of
        those that were found; ``false``, the labels that were found and are not there.
    """
    count = np.bincount(truth.astype(np.intp).ravel() * 256 + prediction.ravel(), minlength=1 << 16)
    joint = count.reshape(256, 256)
    of_truth, of_prediction = joint.sum(1), joint.sum(0)
    dice, hd95, invented = {}, {}, []
    for name, value in labels.items():
        if of_truth[value]:
            total = int(of_truth[value] + of_prediction[value])
            dice[name] = float(2 * joint[value, value] / total)
            if distance and of_prediction[value]:
                hd95[name] = hausdorff95(prediction == value, truth == value)
        elif of_prediction[value]:
            invented.append(name)
    return {"dice": dice, "hd95": hd95, "false": invented}


def hausdorff95(a: BoolArray, b: BoolArray) -> float:
    """The greater of the two 95th percentiles of distances from one mask's border to the other's.

    Args:
        a: (H, W) bool, not empty.
        b: (H, W) bool, not empty.

    Returns:
        In pixels; border pixels are those of the mask beside one that is not (4-neighbourhood).
    """
    x0, y0, x1, y1 = (int(v) for v in tight_box(a | b) or (0, 0, 0, 0))
    borders = []
    for mask in (a, b):
        inside = np.pad(mask[y0 : y1 + 1, x0 : x1 + 1], 1)
        borders.append(inside & ~ndimage.binary_erosion(inside))
    far = []
    for one, other in (borders, borders[::-1]):
        far.append(np.percentile(ndimage.distance_transform_edt(~other)[one], 95))
    return float(max(far))


def image_dice(judged: Judged, *, strict: bool = False) -> float:
    """Mean Dice over the labels of one image.

    Args:
        judged: From `judge`.
        strict: Labels that were found and are not there count as 0; else they are left out, as the authors
            do.

    Returns:
        0 to 1; nan where no label counts.
    """
    values = [*judged["dice"].values(), *([0.0] * len(judged["false"]) if strict else [])]
    return float(np.mean(values)) if values else float("nan")


def mean_dice(images: Mapping[str, Judged], *, strict: bool = False) -> float:
    """Mean over images of `image_dice`; nan where there is nothing to judge."""
    return _mean([image_dice(judged, strict=strict) for judged in images.values()])


def mean_hd95(images: Mapping[str, Judged]) -> float:
    """Mean over images of the mean over labels that are there and were found, in pixels."""
    return _mean([float(np.mean([*j["hd95"].values()])) for j in images.values() if j["hd95"]])


def missed_share(images: Mapping[str, Judged]) -> float:
    """Share of the labels of all images that were not found at all: those have no HD95."""
    there = sum(len(judged["dice"]) for judged in images.values())
    return 1.0 - sum(len(judged["hd95"]) for judged in images.values()) / there if there else float("nan")


def failure_share(images: Mapping[str, Judged], label: str) -> float:
    """Share of the images with a label in which its Dice is below `FAILED_BELOW`."""
    return _mean([float(j["dice"][label] < FAILED_BELOW) for j in images.values() if label in j["dice"]])


def label_dice(images: Mapping[str, Judged], label: str) -> float:
    """Mean Dice of one label over the images that hold it."""
    return _mean([j["dice"][label] for j in images.values() if label in j["dice"]])


def paired_interval(
    ours: Sequence[Mapping[str, Judged]], theirs: Sequence[Mapping[str, Judged]], *, seed: int = 0
) -> tuple[float, float, float]:
    """Difference in Dice of two rows on the same images, and its 95 % bootstrap interval.

    Test images are drawn again with replacement, and with an image the differences of all its seeds: seeds
    share the images, so they are no further independent observations.

    Args:
        ours: One entry per seed: image name to its figures.
        theirs: The same seeds and images of the row that is compared with.
        seed: Of the bootstrap.

    Returns:
        (mean difference, lower end, upper end).
    """
    table = np.array(
        [
            [image_dice(a[name]) - image_dice(b[name]) for name in sorted(a)]
            for a, b in zip(ours, theirs, strict=True)
        ]
    )
    per_image = table.mean(axis=0)
    per_image = per_image[np.isfinite(per_image)]
    rng = np.random.default_rng(seed)
    drawn = per_image[rng.integers(0, len(per_image), (RESAMPLED, len(per_image)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(per_image.mean()), float(low), float(high)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
