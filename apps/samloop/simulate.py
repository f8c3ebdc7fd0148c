"""samloop simulate: plays a clinician against a running server, with ground truth, and reports the clicks.

The clinician takes the next case, starts from the model's proposal where there is one, clicks in the middle
of the largest error until Dice reaches a threshold or a budget of clicks is spent, and accepts. After every
N accepted cases a training is started and waited for. All of it goes through the server's REST interface.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from apps.samloop.client import ServerError
from apps.samloop.simulation import Settings, Simulation
from sam_infer.errors import InputError

#: Arguments that are no fields of `Settings`.
_OTHER = ("func", "command", "train_param", "proposal_param", "out")


def simulate(*, out: Path | None = None, progress: bool = False, **settings: Any) -> dict[str, Any]:
    """Run a simulation.

    Args:
        out: JSON file, written after every case; a figure of the same stem is written at the end. None
            writes nothing.
        progress: Show a progress bar on standard error and a line for each round on standard output.
        **settings: Fields of `Settings`; ``server`` (address) and ``truth`` (folder of masks with the
            images' stems, whose values are the label indices) are required.

    Returns:
        The report: ``clicks_per_case``, ``final_dice``, ``rounds``, ``cases``, ``skipped``, ``settings``...

    Raises:
        InputError: When a setting cannot be used.
        ServerError: When the server cannot be reached or fails; ``out`` then holds the cases until there.
    """
    return Simulation(Settings(**settings), out, progress).run()


def add_parser(subparsers: Any) -> None:
    """Add the command ``simulate`` to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="play a clinician against a running server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, metavar="URL", help="address of the server, http://127.0.0.1:8000")
    add(
        "--truth",
        required=True,
        metavar="DIR",
        help="ground truth: the images' stems, values = label indices",
    )
    add("--label", metavar="NAME", help="only this label; default: all that the case's truth holds")
    add("--budget", type=int, default=10, help="clicks for each label of a case (default %(default)s)")
    add("--accept-dice", type=float, default=0.9, help="content from this Dice (default %(default)s)")
    add("--retrain-every", type=int, default=0, metavar="N", help="train after N cases; 0 = never")
    add("--trainer", default="unet", help="what is trained (default %(default)s)")
    add("--train-param", action="append", default=[], metavar="KEY=VALUE", help="sent to the trainer")
    add("--proposal-model", metavar="MODEL", help="what proposes; default: the trainer's model, else unet")
    add("--proposal-param", action="append", default=[], metavar="KEY=VALUE", help="sent to that model")
    add("--strategy", default="random", help="which case is next (default %(default)s)")
    add("--seed", type=int, default=0, help="sent to the strategy (default %(default)s)")
    add("--max-cases", type=int, metavar="N", help="stop after N cases; default: when none is left")
    add(
        "--first-prompt",
        choices=("click", "box"),
        default="click",
        help="what begins an object without a proposal; a box counts two clicks (default %(default)s)",
    )
    add(
        "--accept",
        choices=("mask", "truth"),
        default="mask",
        help="what is stored: the corrected mask, or the truth as if finished by hand (default %(default)s)",
    )
    add("--timeout", type=float, default=600.0, help="seconds to wait for an answer (default %(default)s)")
    add("--out", required=True, type=Path, metavar="FILE", help="report (JSON); a figure lies beside it")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """The command ``simulate``: 0 on success, 1 with one line on standard error otherwise."""
    values = {k: v for k, v in vars(args).items() if k not in _OTHER}
    try:
        for name in ("train_param", "proposal_param"):
            values[f"{name}s"] = dict(key_value(name, text) for text in getattr(args, name))
        done = simulate(out=args.out, progress=True, **values)
    except (ServerError, InputError, OSError) as error:
        print(f"samloop simulate: {error}", file=sys.stderr)
        return 1
    if not done["cases"]:
        reasons = "; ".join(f"{s['id']}: {s['reason']}" for s in done["skipped"][:3])
        print(
            f"samloop simulate: no case was done. {reasons or 'The server has none left.'}", file=sys.stderr
        )
        return 1
    print(
        f"{len(done['cases'])} cases, {done['clicks_per_case']:.2f} clicks a case, final Dice "
        f"{done['final_dice']:.3f}, {done['below_threshold']} accepted below {args.accept_dice}, "
        f"{len(done['skipped'])} skipped; first prompt: {done['first_prompt']}, stored: {done['accept']}"
    )
    for case in done["skipped"]:
        print(f"skipped {case['id']}: {case['reason']}")
    print(f"report: {args.out}, figure: {args.out.with_suffix('.png')}")
    return 0


def key_value(argument: str, text: str) -> tuple[str, Any]:
    """KEY=VALUE of the command line; the value is JSON, or text where it is none.

    Raises:
        InputError: When it has another form.
    """
    key, found, value = text.partition("=")
    if not found or not key:
        raise InputError(argument, text, "send KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
