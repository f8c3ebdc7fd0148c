"""Two papers' tables with all their controls, on a labelled set of pictures.

python -m bench papers keuth --data ct_abdomen_curvas --out results/keuth
python -m bench papers hakkinen --data ct_abdomen_curvas --out results/hakkinen
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.papers import hakkinen, keuth, tables
from bench.papers.learners import Recipe
from bench.papers.nnunet import check_installed
from bench.papers.pictures import chosen_cases, draw_cases, draw_curves
from bench.papers.records import Outcome
from bench.papers.rows import Row
from bench.papers.sets import find_set, read_set
from bench.papers.split import split_set
from bench.papers.study import Study
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.registry import NAMES, create_engine
from sam_infer.errors import InputError
from sam_infer.files import write_atomic
from sam_infer.networks.unet import check_size
from sam_infer.prompts.annotator import STRATEGIES

_EMBEDDINGS = 8 << 30
#: What ``--quick`` is: enough to see that every kind of row works, too little for figures that mean anything.
_QUICK_IMAGES = 12
_QUICK: dict[str, Any] = {"size": 64, "iterations": 20, "batch": 4, "labelled": (3,), "seeds": 1}
_NOT_QUICK = ("dilated-4", "dilated-16", "box_jitter5", "box_component", "points5")
_DRAWN: tuple[str, ...] = ("unet", "self-raw", "theirs", "parts", "parts-mixed", "mean-teacher", "all")
_SHOWN: tuple[str, ...] = ("truth", "box_component", "box_jitter20", "point", "noise")


def add_parser(commands: Any) -> None:
    """Add ``papers`` to the command line."""
    parser = commands.add_parser("papers", help="pseudo labels by SAM: the tables of two papers")
    parser.add_argument("paper", choices=("keuth", "hakkinen"))
    parser.add_argument(
        "--data", required=True, help="folder with images/ and labels/, or a known set's name"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, tables and pictures")
    parser.add_argument("--labelled", type=int, nargs="+", help="numbers of labelled images (keuth)")
    parser.add_argument("--seeds", type=int, help="draws and trainings (default: 3)")
    parser.add_argument("--engine", default="bundled", choices=NAMES)
    parser.add_argument("--weights", type=Path, help="the engine's checkpoint")
    parser.add_argument("--size", type=int, help="longest side that the U-Nets see (default: the set's)")
    parser.add_argument("--iterations", type=int, help="steps of each training (default: the set's)")
    parser.add_argument("--batch", type=int, help="images per step (default: the set's)")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", help="comma-separated names; default: all but nnunet")
    parser.add_argument(
        "--nnunet", action="store_true", help="with the row of nnU-Net, where it is installed"
    )
    parser.add_argument(
        "--sided", action="store_true", help="a label for each organ of a pair (kidneys, lungs)"
    )
    parser.add_argument("--threads", type=int, help="threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few images, short trainings")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run what is missing, print the tables, write them and the pictures."""
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    try:
        if args.nnunet:
            check_installed()
        study, options = _study(args)
        text = _keuth(study, args, options) if args.paper == "keuth" else _hakkinen(study, args, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _study(args: argparse.Namespace) -> tuple[Study, dict[str, Any]]:
    quick = _QUICK if args.quick else {}
    limit = _QUICK_IMAGES if args.quick else None
    data = read_set(find_set(args.data), limit=limit, sided=args.sided)
    options = {"seeds": 3, **vars(data.defaults), **quick}
    options |= {name: value for name, value in vars(args).items() if name in options and value is not None}
    store = EmbeddingStore(folder=args.out / "embeddings", limit=_EMBEDDINGS)
    recipe = Recipe(
        size=check_size(options["size"]),
        iterations=options["iterations"],
        batch=options["batch"],
        precision=args.precision,
    )
    study = Study(
        data=data,
        split=split_set(data),
        recipe=recipe,
        encoder=SliceEncoder(engine=create_engine(args.engine, weights=args.weights), store=store),
        out=args.out,
        tell=lambda text: print(text, flush=True),
    )
    return study, options


def _keuth(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    rows = _chosen(keuth.ROWS, args, base=keuth.BASE)
    titles = {row.name: row.title for row in rows}
    done: list[Outcome] = []
    text = ""
    for new in keuth.outcomes(study, rows, labelled=options["labelled"], seeds=options["seeds"]):
        done += new
        lines = _lines(done, list(titles), keuth.BASE)
        text = f"{tables.keuth_table(lines, titles)}\n{_words(study, args, options)}"
        _write(study.out / "keuth", text, {"lines": lines})
    shown = {name: titles[name] for name in _DRAWN if name in titles}
    draw_curves(study.out / "keuth_curves.png", lines, {n: t.strip("*") for n, t in shown.items()})
    largest = [o for o in done if o.n in (max(options["labelled"]), len(study.split.train)) and o.seed == 0]
    _picture(study, "keuth", largest, shown, paper=keuth.THEIRS if keuth.THEIRS in titles else keuth.BASE)
    return text


def _hakkinen(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    rows = _chosen(hakkinen.ROWS, args, base=hakkinen.BASE)
    if options["strategies"] and not args.rows:
        kept = (*options["strategies"], hakkinen.BASE, hakkinen.NOISE)
        rows = [row for row in rows if row.name in kept]
    titles = {row.name: row.title for row in rows}
    labels = list(study.data.labels)
    first = tables.strategy_lines(list(hakkinen.labellings(study, list(STRATEGIES))), labels)
    done: list[Outcome] = []
    text = ""
    for new in hakkinen.outcomes(study, rows, seeds=options["seeds"]):
        done += new
        lines = _lines(done, list(titles), hakkinen.BASE)
        both = (tables.strategy_table(first, labels), tables.hakkinen_table(lines, titles))
        text = f"{both[0]}\n{both[1]}\n{_words(study, args, options)}"
        _write(study.out / "hakkinen", text, {"strategies": first, "lines": lines})
    shown = {name: titles[name] for name in _SHOWN if name in titles}
    paper = hakkinen.THEIRS if hakkinen.THEIRS in titles else hakkinen.BASE
    _picture(study, "hakkinen", [o for o in done if o.seed == 0], shown, paper=paper)
    return text


def _chosen(rows: Iterable[Row[Any]], args: argparse.Namespace, *, base: str) -> list[Row[Any]]:
    """The rows that are asked for; the one that others are compared with is always among them."""
    rows = list(rows)
    names = [row.name for row in rows]
    wanted = args.rows.split(",") if args.rows else [row.name for row in rows if not row.optional]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise InputError("rows", ",".join(unknown), f"choose from {', '.join(names)}")
    if args.quick and not args.rows:
        wanted = [name for name in wanted if name not in _NOT_QUICK]
    wanted += [base, *([keuth.NNUNET] if args.nnunet and args.paper == "keuth" else [])]
    return [row for row in rows if row.name in wanted]


def _lines(done: Sequence[Outcome], names: Sequence[str], base: str) -> list[dict[str, Any]]:
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


def _words(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    recipe, split = study.recipe, study.split
    return (
        f"{study.data.name}: {len(split.train)} images to learn from and {len(split.test)} to test, of "
        f"{len({s.group for s in split.test})} other patients or images; {len(study.data.labels)} labels; "
        f"U-Nets at {recipe.size} px, {recipe.iterations} steps of {recipe.batch} images, "
        f"{recipe.precision}; engine {args.engine}; {options['seeds']} seeds.\n\n{tables.NOTES}"
    )


def _write(path: Path, text: str, record: Mapping[str, Any]) -> None:
    write_atomic(path.with_suffix(".md"), text.encode())
    write_atomic(path.with_suffix(".json"), json.dumps(record, indent=1).encode())


def _picture(
    study: Study, name: str, done: Sequence[Outcome], titles: Mapping[str, str], *, paper: str
) -> None:
    by_row = {one.row: one for one in done}
    cases = chosen_cases(by_row[paper])
    samples = {sample.name: sample for sample in study.split.test}
    columns = {title.strip("*"): by_row[row] for row, title in titles.items() if row in by_row}
    draw_cases(study.out / f"{name}.png", [samples[case] for case in cases], columns, study.data.labels)
