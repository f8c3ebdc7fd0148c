"""Which case comes next: the first, a random one, or the one the model is least sure of."""

from __future__ import annotations

import functools
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.strategy import Strategy

from sam_infer.cache import ByteLru
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.networks.unet import UnetModel
from sam_infer.volumes import Image, file_key

#: A case that another client was given this recently comes last.
RESERVED_SECONDS = 600.0


class _Open(Strategy):
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


class First(_Open):
    """The first open case by name."""

    def __init__(self) -> None:
        super().__init__("First open case by name")

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        return {"id": ids[0], "strategy_used": "first"}


class RandomCase(_Open):
    """Any open case; with ``seed`` in the request the choice follows from the seed and the open cases."""

    def __init__(self) -> None:
        super().__init__("Random open case; send a seed to repeat the choice")

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        return {"id": random.Random(_seed(request)).choice(ids), "strategy_used": "random"}


class Uncertainty(_Open):
    """The open case that the U-Net is least confident about.

    Confidence is the mean probability of the predicted class where background is not certain
    (`UnetModel.confidence`): least-confidence sampling (Settles, Active Learning Literature Survey, 2009,
    section 3.1) averaged over the pixels in question.

    Args:
        model: The published model, or None while there is none.
        window_for: The window of an image for a request.
        read: Path to image; a cached reader.
        candidates: Open cases looked at per call, a random subset.
        seconds: No further case is looked at after this time.
    """

    def __init__(
        self,
        *,
        model: Callable[[], UnetModel | None],
        window_for: Callable[[Image, Mapping[str, Any]], Window],
        read: Callable[[Path], Image],
        candidates: int = 30,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(
            f"Open case that the U-Net is least confident about, of up to {candidates} drawn at random "
            f"and looked at within {seconds:g} s"
        )
        self._model = model
        self._window_for = window_for
        self._read = read
        self._candidates = candidates
        self._seconds = seconds
        self._scores: ByteLru[float] = ByteLru(limit=100_000, size_of=lambda score: 1)

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        draw = random.Random(_seed(request))
        model = self._model()
        if model is None:
            return {
                "id": draw.choice(ids),
                "strategy_used": "random",
                "reason": "no U-Net is published yet: accept cases and start training (POST /train/unet)",
            }
        scores, unreadable = self._score(draw.sample(ids, min(self._candidates, len(ids))), model, datastore)
        if not scores:
            return {
                "id": draw.choice(ids),
                "strategy_used": "random",
                "reason": f"none of {len(unreadable)} cases could be read",
            }
        chosen = min(scores, key=lambda i: (scores[i], i))
        return {
            "id": chosen,
            "strategy_used": "uncertainty",
            "reason": f"least confident of {len(scores)} drawn from {len(ids)} open cases",
            "confidence": round(scores[chosen], 4),
            "scored": len(scores),
            "unreadable": unreadable,
            "model": model.fingerprint,
        }

    def _score(
        self, ids: Sequence[str], model: UnetModel, datastore: Any
    ) -> tuple[dict[str, float], list[str]]:
        """Confidence by id, as far as time allows but at least one, and the ids that cannot be read."""
        start = time.monotonic()
        scores: dict[str, float] = {}
        unreadable = []
        for case in ids:
            if scores and time.monotonic() - start > self._seconds:
                break
            path = Path(datastore.get_image_uri(case))
            try:
                make = functools.partial(self._confidence, model, path)
                scores[case], _ = self._scores.get_or_make((file_key(path), model.fingerprint), make)
            except (InputError, OSError):
                unreadable.append(case)
        return scores, unreadable

    def _confidence(self, model: UnetModel, path: Path) -> float:
        image = self._read(path)
        return model.confidence(image, self._window_for(image, {}))


def _seed(request: Mapping[str, Any]) -> int | None:
    value = request.get("seed")
    if value in (None, ""):
        return None
    try:
        return int(str(value))
    except ValueError:
        raise InputError("seed", value, "send a whole number, or leave it out") from None


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
