"""Papers' tables with all their controls, on a labelled set of pictures.

python -m bench papers keuth --data ct_abdomen_curvas --out results/keuth
python -m bench papers hakkinen --data ct_abdomen_curvas --out results/hakkinen
python -m bench papers sammix --data ct_abdomen_curvas --out results/sammix
python -m bench papers konwer --data cxr_lung_v7 --out results/konwer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.papers import hakkinen, keuth, konwer, sammix
from bench.papers.learners import Recipe
from bench.papers.nnunet import check_installed
from bench.papers.report import Paper
from bench.papers.sets import find_set, read_set
from bench.papers.split import split_set
from bench.papers.study import Study
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.registry import NAMES, create_engine
from sam_infer.errors import InputError
from sam_infer.networks.unet import check_size

_EMBEDDINGS = 8 << 30
#: What ``--quick`` is: enough to see that every kind of row works, too little for figures that mean anything.
_QUICK_IMAGES = 12
_QUICK: dict[str, Any] = {"size": 64, "iterations": 20, "batch": 4, "labelled": (3,), "seeds": 1}
PAPERS: Mapping[str, Paper] = {
    one.name: one for one in (keuth.PAPER, hakkinen.PAPER, konwer.PAPER, sammix.PAPER)
}


def add_parser(commands: Any) -> None:
    """Add ``papers`` to the command line."""
    parser = commands.add_parser("papers", help="published methods: the tables of their papers")
    parser.add_argument("paper", choices=tuple(PAPERS))
    parser.add_argument(
        "--data", required=True, help="folder with images/ and labels/, or a known set's name"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, tables and pictures")
    parser.add_argument("--labelled", type=int, nargs="+", help="numbers of labelled images")
    parser.add_argument("--seeds", type=int, help="draws and trainings (default: 3)")
    parser.add_argument("--engine", choices=NAMES, help="default: the paper's here")
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
    parser.add_argument(
        "--label", help="the one label, of papers that learn one (default: the set's only one)"
    )
    parser.add_argument("--threads", type=int, help="threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few images, short trainings")
    for paper in PAPERS.values():
        paper.arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run what is missing, print the tables, write them and the pictures."""
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    try:
        if args.nnunet:
            check_installed()
        paper = PAPERS[args.paper]
        study, options = _study(args, paper)
        text = paper.run(study, args, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _study(args: argparse.Namespace, paper: Paper) -> tuple[Study, dict[str, Any]]:
    quick = _QUICK if args.quick else {}
    limit = _QUICK_IMAGES if args.quick else None
    data = read_set(find_set(args.data), limit=limit, sided=args.sided)
    options = {"seeds": 3, **vars(data.defaults), **paper.defaults, **quick}
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
        encoder=SliceEncoder(
            engine=create_engine(args.engine or paper.engine, weights=args.weights), store=store
        ),
        out=args.out,
        tell=lambda text: print(text, flush=True),
    )
    return study, options
