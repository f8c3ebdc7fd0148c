"""Checkpoint files into networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sam_infer.errors import InputError

#: Registry name -> segment-anything's builder.
VARIANTS = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}


def load_sam(name: str, weights: Path) -> Any:
    """Build a ``segment_anything.modeling.Sam`` from a checkpoint file.

    Args:
        name: Registry name.
        weights: Checkpoint in segment-anything's format; read with ``weights_only``.

    Raises:
        InputError: When the name is unknown or the file is not a checkpoint of that network.
    """
    from segment_anything import sam_model_registry

    if name not in VARIANTS:
        raise InputError("engine", name, f"segment-anything variants are {', '.join(VARIANTS)}")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError("weights", weights.name, f"not a readable checkpoint ({error})") from error
    model = sam_model_registry[VARIANTS[name]](checkpoint=None)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0]
        raise InputError("weights", weights.name, f"not a checkpoint of {name}: {text}") from error
    return model
