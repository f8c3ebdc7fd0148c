"""One set of candidates, what it was made from and how it was answered, as one small file."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam_infer.candidates import CandidateSet, masks_of_bits
from sam_infer.types import Prompts

FORMAT = "samloop-candidates-1"
#: What a damaged archive, or another one, makes its readers raise beside ValueError.
_DAMAGE = (
    KeyError, TypeError, AttributeError, EOFError, OSError, OverflowError, RuntimeError, struct.error,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Candidates, and what they were made from.

    Args:
        image_id: The case.
        label: Name of the label that they are candidates of.
        k: Slice index along the third voxel axis.
        candidates: Their masks, at the slice's own resolution.
        prompts: The points and the box in slice pixels that the engine was given; nothing else is kept.
        fingerprint: The engine's.
    """

    image_id: str
    label: str
    k: int
    candidates: CandidateSet
    prompts: Prompts
    fingerprint: str

    def record(self) -> dict[str, Any]:
        """As JSON, without the masks."""
        made, box = self.candidates, self.prompts.box
        return {
            "image": self.image_id,
            "label": self.label,
            "slice": self.k,
            "source": made.source,
            "count": len(made.masks),
            "thresholds": list(made.thresholds),
            "predicted_iou": list(made.predicted_iou),
            "points": self.prompts.points.tolist(),
            "point_labels": self.prompts.point_labels.tolist(),
            "box": None if box is None else list(box),
            "engine": self.fingerprint,
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What somebody said of candidates: a ranking or ratings, the other is None.

    Args:
        ranking: Indices of all candidates, best first.
        ratings: 1 (worst) to 5 for each candidate.
        who: Who said so, "" where users have no names.
        when: When that was, ISO 8601 with its time zone.
    """

    ranking: tuple[int, ...] | None
    ratings: tuple[int, ...] | None
    who: str
    when: str

    @property
    def scores(self) -> tuple[int, ...]:
        """Of each candidate, higher is better: its rating, or its place from below, the last having 1."""
        if self.ranking is None:
            return self.ratings or ()
        return tuple(len(self.ranking) - self.ranking.index(n) for n in range(len(self.ranking)))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "ranking": None if self.ranking is None else list(self.ranking),
            "ratings": None if self.ratings is None else list(self.ratings),
            "who": self.who,
            "when": self.when,
        }


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one file holds.

    Args:
        asked: The candidates.
        answer: None while nobody has rated them.
    """

    asked: Asked
    answer: Answer | None = None

    def record(self) -> dict[str, Any]:
        """What was asked and answered as JSON, without the masks."""
        return {**self.asked.record(), **(self.answer.record() if self.answer is not None else {})}


def packed(entry: Entry) -> bytes:
    """An entry as the content of a file: masks as one bit each of a compressed map, the rest as JSON."""
    answer = None if entry.answer is None else entry.answer.record()
    record = {"format": FORMAT, "asked": entry.asked.record(), "answer": answer}
    text = np.frombuffer(json.dumps(record, ensure_ascii=False).encode(), np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, bits=entry.asked.candidates.bits, record=text)
    return content.getvalue()


def unpacked(content: bytes) -> Entry:
    """The entry of a file.

    Raises:
        ValueError: When it is damaged or is something else.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            bits, text = arrays["bits"], arrays["record"].tobytes()
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}, expected {FORMAT!r}")
        if bits.ndim != 2 or bits.dtype != np.uint8:
            raise ValueError(f"its map is {bits.dtype} of shape {bits.shape}")
        answer = record["answer"]
        return Entry(asked=_asked(record["asked"], bits), answer=None if answer is None else _answer(answer))
    except _DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _asked(record: Mapping[str, Any], bits: np.ndarray) -> Asked:
    box = record["box"]
    candidates = CandidateSet(
        masks=masks_of_bits(bits, int(record["count"])),
        source=record["source"],
        thresholds=tuple(float(t) for t in record["thresholds"]),
        predicted_iou=tuple(float(v) for v in record["predicted_iou"]),
    )
    prompts = Prompts(
        points=np.asarray(record["points"], np.float32).reshape(-1, 2),
        point_labels=np.asarray(record["point_labels"], np.int64),
        box=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
    )
    return Asked(
        image_id=str(record["image"]),
        label=str(record["label"]),
        k=int(record["slice"]),
        candidates=candidates,
        prompts=prompts,
        fingerprint=str(record["engine"]),
    )


def _answer(record: Mapping[str, Any]) -> Answer:
    ranking, ratings = (
        None if record[key] is None else tuple(int(n) for n in record[key]) for key in ("ranking", "ratings")
    )
    return Answer(ranking=ranking, ratings=ratings, who=str(record["who"]), when=str(record["when"]))
