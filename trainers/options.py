"""Settings of a training request, as viewers and REST clients send them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sam_infer.errors import InputError


def devices() -> list[str]:
    """Where training can run here: CUDA first, and the CPU always by name."""
    import torch

    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def first(value: object) -> object:
    """Viewers send the chosen entry, or the whole list, of which the first is meant."""
    return value[0] if isinstance(value, list) and value else value


def choice(request: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    """One of the known values, the first by default.

    Raises:
        InputError: When it is something else.
    """
    value = first(request.get(name, known[0]))
    if value not in known:
        raise InputError(name, value, f"choose one of {', '.join(known)}")
    return str(value)


def flag(request: Mapping[str, Any], name: str, default: bool) -> bool:
    """A yes or no; "true" and "false" are accepted as text.

    Raises:
        InputError: When it is something else.
    """
    value = request.get(name, default)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise InputError(name, value, "send true or false")
    return value


def number(
    request: Mapping[str, Any], name: str, default: float, *, low: float, high: float, whole: bool = False
) -> float:
    """A number from ``low`` to ``high``, both included; text that is a number is accepted.

    Raises:
        InputError: When it is something else, or not whole where it must be.
    """
    value = request.get(name, default)
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not low <= found <= high or (whole and found != int(found)):
        kind = "whole number" if whole else "number"
        raise InputError(name, value, f"send a {kind} from {low:g} to {high:g}")
    return found
