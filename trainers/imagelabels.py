"""Image-level labels from a table: what is on an image or a slice, without a mask.

A CSV file with a heading: ``image`` (its id, or its file's name), optionally ``slice`` (index from 0), and a
column for each label that anything is known of: 1 = present, 0 = absent, empty = unknown.

    image,slice,liver,lesion
    ct_001,40,1,0
    ct_001,41,1,
    ct_002,,0,0

A row without a slice speaks of the whole image. For a volume, 0 then means that the label is on none of its
slices, and each of them learns from that. 1 means that it is somewhere: no slice can learn from it, so it is
checked and otherwise left aside.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sam_infer.errors import InputError
from sam_infer.volumes import stem

#: What a table may say.
VALUES = {"1": True, "0": False, "": None}


@dataclass(kw_only=True)
class ImageLabels:
    """What a table says of one image.

    Args:
        whole: Label name to whether it is on the image, of rows without a slice.
        slices: The same by slice index.
        lines: Where it says so: the table's line by slice index, None = without a slice.
    """

    whole: dict[str, bool] = field(default_factory=dict)
    slices: dict[int, dict[str, bool]] = field(default_factory=dict)
    lines: dict[int | None, int] = field(default_factory=dict)


def read_image_labels(path: Path, *, labels: Mapping[str, int]) -> dict[str, ImageLabels]:
    """Read a table.

    Args:
        path: The CSV file, UTF-8.
        labels: The project's labels, name to value.

    Returns:
        What is said of each image, by id, in the file's order.

    Raises:
        InputError: (422) With the file, the line, the value and what to do about it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            heading = [name.strip() for name in next(rows, [])]
            columns = _columns(path, heading, labels)
            found: dict[str, ImageLabels] = {}
            for row in rows:
                if any(cell.strip() for cell in row):
                    _read_row(found, row, columns, path=path, line=rows.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            "csv", str(path), f"not a readable CSV file in UTF-8 ({error})", status=422
        ) from None
    return found


def slice_labels(
    of: ImageLabels, *, depth: int, path: Path
) -> tuple[dict[int, dict[str, bool]], dict[str, bool]]:
    """What slices can learn from a table.

    Args:
        of: What it says of the image.
        depth: Number of the image's slices.
        path: The table, for errors.

    Returns:
        What is known of single slices, by index, and what is known of each slice of the image.

    Raises:
        InputError: (422) When a slice is named that the image does not have, or an image of one slice is
            spoken of both by that slice and as a whole.
    """
    for k in of.slices:
        if k >= depth:
            raise _error(path, of.lines[k], "slice", k, f"the image has slices 0 to {depth - 1}")
    every = {name: False for name, present in of.whole.items() if not present}
    if depth > 1:
        return {k: {**every, **known} for k, known in of.slices.items()}, every
    if of.whole and of.slices:
        remedy = f"the image is one slice, of which line {of.lines[None]} speaks too; keep one of them"
        raise _error(path, of.lines[0], "slice", 0, remedy)
    # A single slice is the whole image, so that 1 says where the label is.
    single = {**of.whole, **of.slices.get(0, {})}
    return ({0: single} if single else {}), {}


def check_images(table: Mapping[str, ImageLabels], known: Collection[str], *, path: Path) -> None:
    """Whether all images of a table are there.

    Raises:
        InputError: (422) With the first one that is not.
    """
    for name, of in table.items():
        if name not in known:
            line = min(of.lines.values())
            raise _error(
                path, line, "image", name, "no such image in the datastore; add it, or remove the row"
            )


def _columns(path: Path, heading: list[str], labels: Mapping[str, int]) -> dict[str, int]:
    """Column name to its index."""
    columns = {name: n for n, name in enumerate(heading)}
    known = ", ".join(labels)
    for name in heading:
        if name not in ("image", "slice") and name not in labels:
            raise _error(path, 1, "column", name, f"name the columns image, slice, and labels: {known}")
    if len(columns) < len(heading) or "image" not in columns or not set(columns) & set(labels):
        raise _error(path, 1, "columns", heading, f"needed, once each: image, and one or more of {known}")
    return columns


def _read_row(
    found: dict[str, ImageLabels], row: list[str], columns: Mapping[str, int], *, path: Path, line: int
) -> None:
    """Add what a row says."""
    if len(row) != len(columns):
        raise _error(path, line, "cells", len(row), f"the heading has {len(columns)} columns")
    cells = {name: row[n].strip() for name, n in columns.items()}
    image, index = stem(cells.pop("image")), cells.pop("slice", "")
    if not image:
        raise _error(path, line, "image", "", "name the image, by its id or its file's name")
    if index and not (index.isdecimal() and index.isascii()):
        raise _error(path, line, "slice", index, "give a slice index from 0, or leave it empty")
    for name, cell in cells.items():
        if cell not in VALUES:
            raise _error(path, line, name, cell, "write 1 (present), 0 (absent) or nothing (unknown)")
    k = int(index) if index else None
    of = found.setdefault(image, ImageLabels())
    if k in of.lines:
        raise _error(path, line, "image", image, f"line {of.lines[k]} is about the same; keep one of them")
    of.lines[k] = line
    said = {name: present for name, cell in cells.items() if (present := VALUES[cell]) is not None}
    if k is None:
        of.whole = said
    elif said:
        of.slices[k] = said
    for n, known in of.slices.items():
        for name in (name for name, present in known.items() if present and of.whole.get(name) is False):
            remedy = f"line {of.lines[None]} says that {name} is not on the image; correct one of them"
            raise _error(path, of.lines[n], name, 1, remedy)


def _error(path: Path, line: int, column: str, value: object, remedy: str) -> InputError:
    return InputError(f"{path.name}, line {line}, {column}", value, remedy, status=422)
