"""Averaged weights to the file that the project ships."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sam_infer.engines.bundled import FORMAT as PROMPTNET

SAM_TINY = "samloop-sam-tiny-1"


def export(weights: dict[str, Tensor], path: Path, facts: dict[str, object], form: str = PROMPTNET) -> None:
    """Write fp16 tensors with a header of JSON values, atomically.

    Args:
        weights: By name, any float type.
        path: The .safetensors file.
        facts: Anything JSON can hold: recipe, steps, ``iou_calibration``.
        form: What the file holds, for its header.
    """
    header = {"format": form}
    header |= {name: json.dumps(value) for name, value in facts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({n: v.to(torch.float16).contiguous() for n, v in weights.items()}, part, metadata=header)
    part.chmod(0o644)
    part.replace(path)
