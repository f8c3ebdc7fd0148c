"""`diverse`: the case that is least like those that were accepted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from apps.samloop.strategies.order import Open, at_random, drawn
from apps.samloop.strategies.survey import ReadImage, Survey, WindowFor
from sam_infer.embeddings import SliceEncoder
from sam_infer.intensity import Window
from sam_infer.types import FloatArray
from sam_infer.volumes import Image

#: Evenly spaced slices that describe a volume.
SLICES = 3
#: Bytes of descriptions remembered: tens of thousands of cases.
REMEMBERED = 64 << 20


class Diverse(Open):
    """The open case that is farthest from all accepted ones: farthest-first traversal.

    This is the k-center greedy of Sener & Savarese, Active Learning for Convolutional Neural Networks: A
    Core-Set Approach, ICLR 2018, one case at a time. Where they take the features of the model that is being
    trained, these are an image encoder's that is not (`described`), so that it works from the first case on;
    and it looks at a part of a large datastore only. Both are this project's own choice.

    Args:
        encoder: Gives the encoder that describes images; called when it is first needed.
        name: Its engine, for people.
        window_for: The window of an image for a request.
        read: Path to image; a cached reader.
        candidates: Open cases looked at per call, a random subset.
        accepted: Accepted cases that they are compared with, at most: always the same ones of the same cases.
        seconds: No further case is looked at after this time; half of it is for accepted ones.
    """

    def __init__(
        self,
        *,
        encoder: Callable[[], SliceEncoder],
        name: str,
        window_for: WindowFor,
        read: ReadImage,
        candidates: int = 64,
        accepted: int = 256,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(
            f"Open case that is least like the accepted ones by the image features of {name}, of up to "
            f"{candidates} drawn at random, compared with up to {accepted} and looked at within {seconds:g} s"
        )
        self._encoder = encoder
        self._candidates = candidates
        self._accepted = accepted
        self._seconds = seconds
        self._survey: Survey[FloatArray] = Survey(
            read=read, window_for=window_for, size_of=lambda vector: vector.nbytes, limit=REMEMBERED
        )

    def _choose(self, ids: Sequence[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        draw = drawn(request)
        encoder = self._encoder()

        def see(names: Sequence[str], least: int) -> tuple[dict[str, FloatArray], list[str]]:
            seen = self._survey.see(
                names,
                datastore,
                lambda image, window: described(image, window, encoder),
                made_by=encoder.engine.fingerprint,
                seconds=self._seconds / 2,
                least=least,
            )
            return seen.values, seen.unreadable

        done = sorted(datastore.get_labeled_images(), key=_fixed)[: self._accepted]
        accepted, _ = see(done, 1)
        found, unreadable = see(draw.sample(ids, min(self._candidates, len(ids))), 1)
        if not found:
            return at_random(draw, ids, f"none of {len(unreadable)} cases could be read")
        told = f"of {len(found)} drawn from {len(ids)} open cases"
        if accepted:
            away = distances(found, list(accepted.values()))
            chosen = min(away, key=lambda case: (-away[case], case))
            reason = f"least like {len(accepted)} accepted cases {told}"
        else:
            centre = np.mean(list(found.values()), axis=0)
            away = distances(found, [centre])
            chosen = min(away, key=lambda case: (away[case], case))
            reason = f"no accepted case to compare with: nearest to the mean {told}"
        return {
            "id": chosen,
            "strategy_used": "diverse",
            "reason": reason,
            "distance": round(away[chosen], 4),
            "scored": len(found),
            "compared": len(accepted),
            "unreadable": unreadable,
            "engine": encoder.engine.name,
        }


def described(image: Image, window: Window, encoder: SliceEncoder) -> FloatArray:
    """What an image looks like: mean and standard deviation over space of its embedding's features.

    Of up to `SLICES` slices, each in the middle of an equal part of the volume, averaged.

    Returns:
        (F,) float32 of unit length.
    """
    vectors = []
    depth = image.shape[2]
    count = min(SLICES, depth)
    for k in ((2 * n + 1) * depth // (2 * count) for n in range(count)):
        features = encoder.embedding(image, k, window)[0].features
        maps = [features[name].float().flatten(-2) for name in sorted(features)]
        parts = [part for one in maps for part in (one.mean(-1), one.std(-1, correction=0))]
        vectors.append(torch.cat([part.flatten() for part in parts]).cpu().numpy())
    mean = np.mean(vectors, axis=0)
    length = float(np.linalg.norm(mean))
    unit: FloatArray = (mean / length if length else mean).astype(np.float32)
    return unit


def distances(vectors: Mapping[str, FloatArray], others: Sequence[FloatArray]) -> dict[str, float]:
    """Euclidean distance of each (F,) vector to the nearest of the others."""
    table = np.stack(others)
    return {case: float(np.linalg.norm(table - vector, axis=1).min()) for case, vector in vectors.items()}


def _fixed(case: str) -> str:
    """Orders cases in a way that does not change when others come or go."""
    return hashlib.sha256(case.encode()).hexdigest()
