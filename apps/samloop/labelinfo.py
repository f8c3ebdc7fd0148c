"""Which label a saved value means: viewers number segments in their own way, the project in its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sam_infer.errors import InputError


def index_of_value(present: Iterable[int], label_info: object, labels: Mapping[str, int]) -> dict[int, int]:
    """Map the values of a saved label file to the project's label indices, by name.

    3D Slicer exports the n-th listed segment as value n, while the ``idx`` that it sends counts segments
    that it did not export too; other clients use ``idx`` as the value. So a value is taken from ``value``
    where all entries have one, else by position where every present value is a position in the list and the
    indices are Slicer's (they run without a hole, or rise and are not the values), else by ``idx``.

    Args:
        present: The values in the file, 0 excepted.
        label_info: [{"name": str, "idx": int, "value": int (optional)}, ...] as the client sent it; None or
            empty = the values are the project's indices.
        labels: The project's label name -> index.

    Returns:
        File value -> project index, for every present value.

    Raises:
        InputError: When a present value has no entry, or its name is not a label of the project.
    """
    values = sorted(set(present) - {0})
    known = ", ".join(f"{index} = {name}" for name, index in labels.items())
    if not label_info:
        names: dict[int, str] = {index: name for name, index in labels.items()}
    else:
        names = _names(_entries(label_info), values)
    mapping = {}
    for value in values:
        if value not in names:
            raise InputError(
                "label", value, f"label values must be listed in label_info, or be among {known}", status=422
            )
        if names[value] not in labels:
            raise InputError(
                "label_info",
                names[value],
                f"not a label of this project; rename the segment to one of {known}",
                status=422,
            )
        mapping[value] = labels[names[value]]
    return mapping


def _entries(label_info: object) -> list[dict[str, Any]]:
    remedy = 'send [{"name": "liver", "idx": 1}, ...]'
    if not isinstance(label_info, list):
        raise InputError("label_info", label_info, remedy)
    for entry in label_info:
        numbers = (
            [entry.get(k) for k in ("idx", "value") if k in entry] if isinstance(entry, dict) else [None]
        )
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError("label_info", entry, remedy)
        if any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
            raise InputError("label_info", entry, remedy)
    return label_info


def _names(entries: list[dict[str, Any]], values: list[int]) -> dict[int, str]:
    explicit = ["value" in entry for entry in entries]
    if all(explicit):
        return {entry["value"]: entry["name"] for entry in entries}
    if any(explicit):
        raise InputError("label_info", entries, "send value with all entries or with none")
    positions = {position: entry["name"] for position, entry in enumerate(entries, start=1)}
    indices = [entry.get("idx", position) for position, entry in enumerate(entries, start=1)]
    rising = indices == sorted(set(indices))
    as_slicer = rising and (
        indices[-1] - indices[0] == len(indices) - 1 or any(value not in indices for value in values)
    )
    if as_slicer and all(value in positions for value in values):
        return positions
    return {index: entry["name"] for index, entry in zip(indices, entries, strict=True)}
