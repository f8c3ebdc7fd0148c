"""The values of a label map as its receiver takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def numbered(
    labelmap: NDArray[np.uint8], labels: Mapping[str, int], request: Mapping[str, Any]
) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Number the labels that are present for the viewer that asked.

    OHIF gets the file alone and takes its values for the indices of the model's ``labels``. 3D Slicer gets
    ``label_names`` beside it, and imports value n as the n-th of these names, whatever their numbers; it
    clears a segment that is named and absent. So a file that ``label_names`` go with has the values 1 to n.

    Args:
        labelmap: (I, J, K) uint8, values of ``labels``.
        labels: Name -> index.
        request: ``label_values``, which the server sets: "contiguous" where the reply has ``label_names``.

    Returns:
        The label map, renumbered where asked; and name -> value of the labels that are present, ascending.
    """
    present = np.flatnonzero(np.bincount(labelmap.reshape(-1, order="A"), minlength=256)[1:]) + 1
    names = {index: name for name, index in labels.items()}
    if request.get("label_values") != "contiguous":
        return labelmap, {names[value]: value for value in present.tolist()}
    lookup = np.zeros(256, np.uint8)
    lookup[present] = np.arange(1, len(present) + 1)
    renumbered = np.asfortranarray(lookup[labelmap])
    return renumbered, {names[value]: n for n, value in enumerate(present.tolist(), start=1)}
