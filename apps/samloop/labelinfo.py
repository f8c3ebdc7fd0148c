"""Which label a saved value means: viewers number segments in their own way, the project in its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sam_infer.errors import InputError


def index_of_value(present: Iterable[int], label_info: object, labels: Mapping[str, int]) -> dict[int, int]:
    """Map the values of a saved label file to the project's label indices, by name.

    3D Slicer exports the n-th listed segment as value n, while the ``idx`` that it sends counts segments
    that it did not export too; other clients use ``idx`` as the value. So a value is taken from ``value``
    where all entries have one; else by position where every present value is one and the indices rise; else
    by ``idx``. Where both can be meant and differ, it is by position if the indices run without a hole from
    what cannot be the project's own; else the label is refused, as one of the two would be a wrong organ.

    Args:
        present: The values in the file, 0 excepted.
        label_info: [{"name": str, "idx": int, "value": int (optional)}, ...] as the client sent it; None or
            empty = the values are the project's indices.
        labels: The project's label name -> index.

    Returns:
        File value -> project index, for every present value.

    Raises:
        InputError: When a present value has no entry or may be either of two names, or its name is not a
            label of the project.
    """
    values = sorted(set(present) - {0})
    known = ", ".join(f"{index} = {name}" for name, index in labels.items())
    if not label_info:
        names: dict[int, str] = {index: name for name, index in labels.items()}
    else:
        names = _names(_entries(label_info), values, labels)
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


def _names(entries: list[dict[str, Any]], values: list[int], labels: Mapping[str, int]) -> dict[int, str]:
    explicit = ["value" in entry for entry in entries]
    if all(explicit):
        return {entry["value"]: entry["name"] for entry in entries}
    if any(explicit):
        raise InputError("label_info", entries, "send value with all entries or with none")
    positions = {position: entry["name"] for position, entry in enumerate(entries, start=1)}
    indices = [entry.get("idx", position) for position, entry in enumerate(entries, start=1)]
    by_idx = {index: entry["name"] for index, entry in zip(indices, entries, strict=True)}
    rising = indices == sorted(set(indices))
    if not rising or any(value not in positions for value in values):
        return by_idx
    doubtful = [value for value in values if value in by_idx and by_idx[value] != positions[value]]
    if not doubtful or any(value not in by_idx for value in values):
        return positions
    without_hole = indices[-1] - indices[0] == len(indices) - 1
    if without_hole and any(labels.get(name) != index for index, name in by_idx.items()):
        return positions
    value = doubtful[0]
    raise InputError(
        "label",
        value,
        f"either {positions[value]} (segment {value} of the list) or {by_idx[value]} (its idx); in 3D Slicer "
        "move the segments background and scribbles to the end of the list, or send value in label_info",
        status=422,
    )


def stored_info(label_info: object, labels: Mapping[str, int]) -> dict[str, Any]:
    """``label_info`` as it is true of the stored file, whose values are the project's indices.

    Args:
        label_info: As the client sent it, checked by `index_of_value`.
        labels: The project's label name -> index.

    Returns:
        {"label_info": entries of the project's labels with their index as ``idx`` and ``value``}; {} where
        none was sent.
    """
    if not isinstance(label_info, list) or not label_info:
        return {}
    entries = {entry["name"]: entry for entry in label_info if entry["name"] in labels}
    return {"label_info": [{**e, "idx": labels[name], "value": labels[name]} for name, e in entries.items()]}
