"""`samloop rollback`: takes back what a training put in service; what it replaced serves again.

A server that runs notices by itself. What was taken back is kept.
"""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apps.samloop.home import add_data_argument, home_of, use_data
from sam_infer.errors import InputError

if TYPE_CHECKING:
    from trainers.gate import Publisher


def add_parser(commands: Any) -> None:
    """Add ``rollback`` to the command line."""
    parser = commands.add_parser(
        "rollback", help="serve the weights again that a training replaced", description=__doc__
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a trained model, such as unet")
    add("--studies", required=True, metavar="DIR|URL", help="whose trained models; as for `samloop serve`")
    add_data_argument(parser)
    add("--list", action="store_true", help="print what was decided of each model, and change nothing")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Take a model back, or list what there is."""
    from trainers.gate import publisher_of, publishers

    use_data(args.data)
    folder = home_of(args.studies) / "models"
    if args.list:
        names = [args.model] if args.model else list(publishers(folder))
        for name in names:
            _print(name, publisher_of(folder, name))
        if not names:
            print(f"no model has been trained in {folder}")
        return 0
    if args.model is None:
        known = ", ".join(publishers(folder)) or "none has been trained here"
        raise InputError("MODEL", None, f"name the model to take back ({known}), or send --list")
    facts = publisher_of(folder, args.model).rollback(who=_user())
    print(f"{args.model}: {facts['reason']}")
    return 0


def _user() -> str:
    """The name of who calls; "" on a machine that does not know it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _print(name: str, publisher: Publisher) -> None:
    lines, force = publisher.lines(), publisher.in_force()
    state = publisher.state()
    serves = f"{state['sha256'][:12]} serves" if state["sha256"] else "nothing that was trained serves"
    print(f"{name}: {serves}, {state['history']} to go back to")
    for line in lines:
        mark = "*" if line == force else " "
        sha256 = str(line["candidate_sha256"] or "-")[:12]
        print(f"{mark} {line['time']}  {line['decision']:11}  {sha256:12}  {line['reason']}{_figures(line)}")


def _figures(line: Mapping[str, Any]) -> str:
    """What the candidate reaches and what served then did, in brackets; "" where nothing was judged."""
    told = []
    for who in ("candidate", "champion"):
        score = line.get(who) or {}
        told += [f"{who} {k} {v:.3f}" for k, v in score.items() if isinstance(v, float)]
    return f" ({', '.join(told)})" if told else ""
