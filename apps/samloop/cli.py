"""The command line: samloop serve | predict | simulate | embed | weights | rollback | doctor."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from sam_infer.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    from apps.samloop import doctor, embed, predict, rollback, serve, simulate, weights

    parser = argparse.ArgumentParser(
        prog="samloop",
        description="Segment Anything proposes, the clinician corrects and accepts, the models learn.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve.add_parser(commands)
    predict.add_parser(commands)
    simulate.add_parser(commands)
    embed.add_parser(commands)
    weights.add_parser(commands)
    rollback.add_parser(commands)
    doctor.add_parser(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(args.func(args) or 0)
    except InputError as error:
        print(f"samloop {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
