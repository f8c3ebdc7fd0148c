"""The mean of the weights of files of one network: ``python -m trainers.pretrain.average A B --out C``.

Trainings that go on from one another end near each other, and the mean of their weights generalises at least
as well as either (Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from trainers.pretrain.export import export


def average(paths: Sequence[Path], out: Path) -> None:
    """Write the mean of files that `trainers.pretrain.export.export` wrote; the header is the last one's.

    Args:
        paths: Two files or more.
        out: The file to write, with ``averaged``, the steps of each, in its header.

    Raises:
        ValueError: When the files do not hold the same network.
    """
    total: dict[str, Tensor] = {}
    steps: list[object] = []
    header: dict[str, str] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in sorted(file.keys())}
        if total and {k: v.shape for k, v in total.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError(f"{path.name} holds another network than {paths[0].name}")
        total = {key: value + total.get(key, 0.0) for key, value in state.items()}
        steps.append(json.loads(header.get("steps", "null")))
    facts = {key: json.loads(value) for key, value in header.items() if key != "format"}
    mean = {key: value / len(paths) for key, value in total.items()}
    export(mean, out, facts | {"averaged": steps}, header.get("format", ""))


def main(arguments: list[str] | None = None) -> None:
    """Parse, average."""
    parser = argparse.ArgumentParser(prog="python -m trainers.pretrain.average", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="weight files of one network")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        average(given.files, given.out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
