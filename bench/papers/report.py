"""What the papers have in common where they meet the command line: rows asked for, tables, pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.papers import tables
from bench.papers.pictures import chosen_cases, draw_cases
from bench.papers.records import Outcome
from bench.papers.rows import Row
from bench.papers.study import Study
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.files import write_atomic
from sam_infer.types import Box


def _nothing(parser: argparse.ArgumentParser) -> None:
    """A paper without arguments of its own."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper's tables, as the command line finds them.

    Args:
        name: On the command line and in files.
        run: Runs what is missing of a study, writes tables and pictures, and returns the text to print; gets
            the study, the command line and the options (seeds, labelled, size, iterations, batch, ...).
        engine: Engine where the command line names none.
        defaults: Options that are other than the set's where the command line says nothing.
        arguments: Adds arguments of its own to the parser.
    """

    name: str
    run: Callable[[Study, argparse.Namespace, Mapping[str, Any]], str]
    engine: str = "bundled"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[argparse.ArgumentParser], None] = _nothing


def sam_of(study: Study) -> SamEngine:
    """The study's engine, where it is a SAM: nothing else can be tuned.

    Raises:
        InputError: When it is another.
    """
    engine = study.encoder.engine
    if not isinstance(engine, SamEngine):
        raise InputError(
            "engine", engine.name, "this paper tunes a SAM: choose sam_tiny, or vit_b, vit_l, ..."
        )
    return engine


def chosen_rows(
    rows: Iterable[Row[Any]],
    args: argparse.Namespace,
    *,
    base: str,
    slow: Sequence[str] = (),
    also: Sequence[str] = (),
) -> list[Row[Any]]:
    """The rows that are asked for.

    Args:
        rows: All of the paper.
        args: With ``rows`` and ``quick``.
        base: What others are compared with; it is always among them.
        slow: Names that a quick run leaves out where it names no rows.
        also: Names that are always among them.
    """
    rows = list(rows)
    names = [row.name for row in rows]
    wanted = args.rows.split(",") if args.rows else [row.name for row in rows if not row.optional]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise InputError("rows", ",".join(unknown), f"choose from {', '.join(names)}")
    if args.quick and not args.rows:
        wanted = [name for name in wanted if name not in slow]
    wanted += [base, *also]
    return [row for row in rows if row.name in wanted]


def summaries(done: Sequence[Outcome], names: Sequence[str], base: str) -> list[dict[str, Any]]:
    """A summary of each number of labelled images and row, in the table's order."""
    out = []
    for n in sorted({one.n for one in done}):
        here = [one for one in done if one.n == n]
        beside = [one for one in here if one.row == base]
        for name in names:
            some = [one for one in here if one.row == name]
            if some:
                out.append(tables.summary(some, beside))
    return out


def words(study: Study, options: Mapping[str, Any]) -> str:
    """What a table was measured with."""
    recipe, split = study.recipe, study.split
    return (
        f"{study.data.name}: {len(split.train)} images to learn from and {len(split.test)} to test, of "
        f"{len({s.group for s in split.test})} other patients or images; {_labels(len(study.data.labels))}; "
        f"U-Nets at {recipe.size} px, {recipe.iterations} steps of {recipe.batch} images, "
        f"{recipe.precision}; engine {study.encoder.engine.name}; {options['seeds']} seeds."
    )


def _labels(count: int) -> str:
    return "1 label" if count == 1 else f"{count} labels"


def write(path: Path, text: str, record: Mapping[str, Any]) -> None:
    """Write a table for people (.md) and its figures (.json); ``path`` is without an ending."""
    write_atomic(path.with_suffix(".md"), text.encode())
    write_atomic(path.with_suffix(".json"), json.dumps(record, indent=1).encode())


def picture(
    study: Study,
    name: str,
    done: Sequence[Outcome],
    titles: Mapping[str, str],
    *,
    paper: str,
    boxes: Mapping[str, Box | None] | None = None,
) -> None:
    """Draw the median and the worst test images of a row.

    Args:
        study: With the test images.
        name: Of the file, without its ending.
        done: At most one outcome of each row.
        titles: Row name to title, of the rows to draw.
        paper: The row that the images are chosen by.
        boxes: By image name, the box that was given as a prompt; None = none are drawn.
    """
    by_row = {one.row: one for one in done}
    cases = chosen_cases(by_row[paper])
    samples = {sample.name: sample for sample in study.split.test}
    columns = {title.strip("*"): by_row[row] for row, title in titles.items() if row in by_row}
    chosen = [samples[case] for case in cases]
    draw_cases(study.out / f"{name}.png", chosen, columns, study.data.labels, boxes=boxes or {})
