"""Engines by name."""

from __future__ import annotations

from pathlib import Path

from sam_infer.engines.base import Engine
from sam_infer.engines.checkpoint import VARIANTS
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError

BUNDLED = "bundled"
NAMES = (BUNDLED, *VARIANTS)


def create_engine(name: str, *, weights: Path | None = None, device: str = "cpu") -> Engine:
    """Create an engine; its weights load on first use.

    Args:
        name: One of `NAMES`.
        weights: Checkpoint file; the bundled engine brings its own.
        device: Torch device.

    Raises:
        InputError: When the name is unknown or a checkpoint is needed and missing.
    """
    if name == BUNDLED:
        from sam_infer.engines.bundled import BundledEngine

        return BundledEngine(weights=weights, device=device)
    if name not in VARIANTS:
        raise InputError("engine", name, f"choose one of {', '.join(NAMES)}")
    if weights is None or not weights.is_file():
        raise InputError(
            "weights",
            str(weights) if weights else None,
            f"{name} needs its checkpoint file; give its path in the project file (engine.weights) "
            "or with --weights",
        )
    return SamEngine(name=name, weights=weights, device=device)
