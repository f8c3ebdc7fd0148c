"""Engines by name."""

from __future__ import annotations

from pathlib import Path

from sam_infer.engines.base import Engine
from sam_infer.engines.catalog import CATALOG, Entry
from sam_infer.engines.location import find
from sam_infer.engines.runtime import AUTO
from sam_infer.errors import InputError

NAMES = tuple(CATALOG)
#: Those with SAM's own prompt encoder and mask decoder, which can be tuned.
SAMS = tuple(name for name, entry in CATALOG.items() if entry.family == "sam")


def entry_of(name: str) -> Entry:
    """The catalogue's entry of an engine.

    Raises:
        InputError: When there is none of that name.
    """
    if name not in CATALOG:
        raise InputError("engine", name, f"choose one of {', '.join(NAMES)}")
    return CATALOG[name]


def create_engine(
    name: str, *, weights: Path | None = None, device: str = "cpu", runtime: str = AUTO
) -> Engine:
    """Create an engine; its weights load on first use. Nothing is ever fetched here.

    Args:
        name: One of `NAMES`.
        weights: Checkpoint file, or a folder that holds it under the catalogue's name; None = the packaged
            file or the one in the cache folder.
        device: Torch device.
        runtime: How the image encoder of a SAM is run (`sam_infer.engines.runtime`).

    Raises:
        InputError: When the name is unknown, the checkpoint is missing, or the runtime cannot run here.
    """
    entry = entry_of(name)
    if runtime != AUTO and entry.family != "sam":
        raise InputError("engine.runtime", runtime, f"{name} has none to choose; leave it at {AUTO}")
    path = find(entry, weights)
    if entry.family == "bundled":
        from sam_infer.engines.bundled import BundledEngine

        return BundledEngine(weights=path, device=device)
    if entry.family == "sam2":
        from sam_infer.engines.sam2 import Sam2Engine

        return Sam2Engine(name=name, weights=path, device=device)
    from sam_infer.engines.sam import SamEngine

    assert entry.architecture is not None
    return SamEngine(
        name=name,
        weights=path,
        architecture=entry.architecture,
        framing=entry.framing,
        device=device,
        runtime=runtime,
    )
