"""Which case comes next, whatever the models say: the first by name, or a random one."""

from __future__ import annotations

import random
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from monailabel.interfaces.tasks.strategy import Strategy

from sam_infer.errors import InputError

#: A case that another client was given this recently comes last.
RESERVED_SECONDS = 600.0


class Open(Strategy):
    """Chooses among the cases without an accepted label, those that others just got last."""

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        """Choose the next case.

        Args:
            request: ``client_id``, ``label_tag`` and ``labels`` as MONAI Label sends them, ``seed``.
            datastore: MONAI Label's.

        Returns:
            {"id": case, ...}, or {} where nothing is left.
        """
        ids = sorted(datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels")))
        free = [i for i in ids if not _reserved(datastore.get_image_info(i), request.get("client_id"))]
        if not ids:
            return {}
        chosen = self._choose(free or ids, request, datastore)
        if not isinstance(datastore.get_image_info(chosen["id"]).get("strategy", {}), dict):
            # A client's own; MONAI Label notes there who got the case, and needs a mapping.
            datastore.update_image_info(chosen["id"], {"strategy": {}})
        return chosen

    @abstractmethod
    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        """One of at least one sorted ids."""


class First(Open):
    """The first open case by name."""

    def __init__(self) -> None:
        super().__init__("First open case by name")

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        return {"id": ids[0], "strategy_used": "first"}


class RandomCase(Open):
    """Any open case; with ``seed`` in the request the choice follows from the seed and the open cases."""

    def __init__(self) -> None:
        super().__init__("Random open case; send a seed to repeat the choice")

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        return {"id": drawn(request).choice(ids), "strategy_used": "random"}


def drawn(request: Mapping[str, Any]) -> random.Random:
    """Chance, which repeats itself where the request has a ``seed``."""
    value = request.get("seed")
    if value in (None, ""):
        return random.Random()
    try:
        return random.Random(int(str(value)))
    except ValueError:
        raise InputError("seed", value, "send a whole number, or leave it out") from None


def at_random(draw: random.Random, ids: Sequence[str], reason: str) -> dict[str, Any]:
    """The answer of a strategy that cannot do its work: any case, and why."""
    return {"id": draw.choice(ids), "strategy_used": "random", "reason": reason}


def _reserved(info: Mapping[str, Any], client: object) -> bool:
    """Whether another client was given this case a short time ago.

    Args:
        info: Of the image; clients can store any JSON in it, so ``strategy`` may be anything.
        client: Who asks.
    """
    given, now = info.get("strategy"), time.time()
    return isinstance(given, Mapping) and any(
        isinstance(entry, Mapping)
        and entry.get("client_id") != client
        and isinstance(entry.get("ts"), int | float)
        and now - RESERVED_SECONDS < entry["ts"] < now + RESERVED_SECONDS
        for entry in given.values()
    )
