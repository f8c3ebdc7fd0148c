"""Which accepted cases are never trained on: decided by name, so that it never changes as labels grow."""

from __future__ import annotations

import hashlib
import re


def is_held_out(case_id: str, *, fraction: float, group: str | None = None) -> bool:
    """Whether a case belongs to the held-out part.

    The decision depends on the name alone: a case that was held out yesterday is held out tomorrow, and the
    figures of two rounds can be compared.

    Args:
        case_id: The case's name.
        fraction: Share of all groups that is held out in the long run, 0..1.
        group: Regular expression whose first group (or whole match, where it has no group) names what must
            stay together, for instance ``^(patient_\\d+)`` for slices of one patient. A case that it does not
            match is its own group.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction = {fraction!r}: must lie in 0..1")
    digest = hashlib.sha256(group_of(case_id, group=group).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def group_of(case_id: str, *, group: str | None = None) -> str:
    """The name of the group that a case belongs to; see `is_held_out`."""
    found = re.search(group, case_id) if group else None
    if found is None:
        return case_id
    return str(found.group(1) if found.re.groups and found.group(1) is not None else found.group(0))
