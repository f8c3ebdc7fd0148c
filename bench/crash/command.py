"""python -m bench crash --out results --kills 200 --cases 20,5000

Kills processes that save labels, train, or serve at random moments, starts anew over what they left, and
counts what is missing of all that they had answered. The same seed kills after the same times.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.crash import saving, serving, training
from bench.crash.book import TROUBLES
from bench.proc import cpu_name
from bench.store import fill
from bench.table import markdown

#: What is killed.
WAYS = ("saving", "training", "serving")


def add_parser(commands: Any) -> None:
    """Add ``crash`` to the command line."""
    parser = commands.add_parser("crash", help="what kill -9 leaves", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for crash.md and crash.json")
    parser.add_argument("--kills", type=int, default=200, help="kills of each way and number of cases")
    parser.add_argument("--cases", default="20,5000", help="numbers of cases")
    parser.add_argument("--ways", default="saving,training", help=f"what is killed: {', '.join(WAYS)}")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Kill, print the table, write it; 1 where anything was lost."""
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.CRITICAL)
    ways: dict[str, Callable[..., Counter[str]]] = {
        "saving": saving.kill_savers,
        "training": training.kill_trainings,
        "serving": serving.kill_servers,
    }
    found: dict[str, Counter[str]] = {}
    for way in args.ways.split(","):
        for count in map(int, args.cases.split(",")):
            with tempfile.TemporaryDirectory(prefix="crash-", dir=args.out) as name:
                folder = Path(name, "studies").resolve()
                fill(folder, count, accepted=way != "training")

                def tell(kills: int, way: str = way, count: int = count) -> None:
                    print(f"{way}, {count} cases: {kills} of {args.kills} kills", flush=True)

                found[f"{way}, {count} cases"] = ways[way](
                    folder, images=count, kills=args.kills, seed=args.seed, every=tell
                )
            text = f"{table(found)}\n{cpu_name()}\n"
            (args.out / "crash.md").write_text(text)
            (args.out / "crash.json").write_text(json.dumps(found, indent=1))
    print(text, end="")
    return int(any(counts[trouble] for counts in found.values() for trouble in TROUBLES))


def table(found: dict[str, Counter[str]]) -> str:
    """What was killed, how often, and each trouble's count, as a markdown table."""
    kinds = list(TROUBLES)
    kinds += sorted({kind for counts in found.values() for kind in counts} - set(TROUBLES) - {"kills"})
    rows = [[what, counts["kills"], *(counts[kind] for kind in kinds)] for what, counts in found.items()]
    return markdown(["killed while", "kills", *kinds], rows)
