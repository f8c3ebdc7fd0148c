"""Where a run of the loop is kept, so that a killed one goes on where it was."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sam_infer.files import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The file of one run's state.

    Args:
        path: The file; there whole or not at all.
        key: What the run depends on: data, settings, start. A state with another key is never continued.
        every: Seconds between two writes, at least.
    """

    path: Path
    key: str
    every: float

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state: tensors, numbers, text, and lists and dicts of them."""
        buffer = io.BytesIO()
        torch.save({"key": self.key, **state}, buffer)
        write_atomic(self.path, buffer.getvalue())

    def load(self) -> dict[str, Any] | None:
        """The state that was kept; None where there is none, it is of another run, or damaged."""
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:
            # Of many types, since anything may be in a damaged file; the run then starts anew.
            logger.warning("%s cannot be continued: %s", self.path.name, error)
            return None
        return state if state.get("key") == self.key else None
