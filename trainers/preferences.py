"""Candidates that users rated or ranked, by case: weak labels, kept apart from accepted masks.

A folder for each case, in it one file for each rated set of candidates, whole or not at all; what is
answered anew or removed goes to the history beside it. Sets that wait for an answer lie in a folder of their
own, whose name no case can have.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sam_infer.candidates import CandidateSet
from sam_infer.errors import InputError
from sam_infer.files import copy_atomic, sweep, write_atomic
from sam_infer.types import Prompts
from trainers.data import check_image_id
from trainers.preferencefile import Answer, Asked, Entry, packed, unpacked

logger = logging.getLogger(__name__)

#: Sets that wait for an answer; the oldest go first (an own choice).
MAX_PENDING = 256
#: Ratings of a candidate, worst and best.
RATINGS = (1, 5)
_PENDING = ".pending"
_SUFFIX = ".npz"
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """The rated candidates of one case.

    Args:
        rated: By id, those first that were answered first.
        damaged: Ids of those whose files cannot be read.
    """

    rated: dict[str, Entry]
    damaged: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As JSON: ``rated``, what was asked and answered, without the masks; and ``damaged``."""
        rated = [{"candidates": name, **entry.record()} for name, entry in self.rated.items()]
        return {"rated": rated, "damaged": list(self.damaged)}


class PreferenceStore:
    """A folder of rated candidates by image id. Safe to use from several threads; other processes may read.

    Args:
        folder: Where the files lie; made on the first write. Earlier versions lie in ``history`` beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._history = folder.parent / "history" / folder.name
        self._pending = folder / _PENDING
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """Ids of the cases that have rated candidates, sorted."""
        return sorted({path.parent.name for path in self.folder.glob(f"[!.]*/[!.]*{_SUFFIX}")})

    def get(self, image_id: str) -> Preferences:
        """The rated candidates of a case; a file that cannot be read is told of, and stops nothing."""
        found: list[tuple[str, str, Entry]] = []
        damaged = []
        for path in sorted(self._case(image_id).glob(f"[!.]*{_SUFFIX}")):
            try:
                entry = unpacked(path.read_bytes())
                if entry.answer is None:
                    raise ValueError("it has no answer")
            except FileNotFoundError:
                continue
            except ValueError as error:
                logger.warning("Rated candidates %s of %s are damaged: %s", path.stem, image_id, error)
                damaged.append(path.stem)
                continue
            found.append((entry.answer.when, path.stem, entry))
        rated = {name: entry for _, name, entry in sorted(found, key=lambda one: one[:2])}
        return Preferences(rated=rated, damaged=tuple(damaged))

    def all_rated(self) -> Iterator[Entry]:
        """All rated candidates of all cases, for training; what is damaged is logged and left out."""
        for image_id in self.ids():
            yield from self.get(image_id).rated.values()

    def put_candidates(
        self,
        image_id: str,
        *,
        label: str,
        k: int,
        candidates: CandidateSet,
        prompts: Prompts,
        fingerprint: str,
    ) -> str:
        """Keep candidates until they are answered; of those that wait, the `MAX_PENDING` newest stay.

        Args:
            image_id: The case.
            label: Name of the label that they are candidates of.
            k: Slice index.
            candidates: Their masks.
            prompts: What they were made from; its points and its box are kept.
            fingerprint: The engine's.

        Returns:
            Their id, which follows from all of this: equal candidates have one.
        """
        self._case(image_id)
        asked = Asked(
            image_id=image_id,
            label=label,
            k=k,
            candidates=candidates,
            prompts=prompts,
            fingerprint=fingerprint,
        )
        digest = hashlib.sha256(json.dumps([asked.record(), candidates.masks.shape]).encode())
        digest.update(candidates.bits.tobytes())
        name = digest.hexdigest()[:32]
        with self._lock:
            write_atomic(self._waiting(name), packed(Entry(asked=asked)))
            sweep(self._pending)
            files = sorted(self._pending.glob(f"[!.]*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
            for path in files[:-MAX_PENDING]:
                path.unlink(missing_ok=True)
        return name

    def find(self, candidates_id: str) -> Entry:
        """A set of candidates, as answered where it was, else as it waits.

        Raises:
            InputError: (404) When there is none of this id; (422) when its file is damaged.
        """
        if not _ID.fullmatch(candidates_id):
            raise _unknown(candidates_id)
        damage = None
        rated = self.folder.glob(f"[!.]*/{candidates_id}{_SUFFIX}")
        for path in (*rated, self._waiting(candidates_id)):
            try:
                return unpacked(path.read_bytes())
            except FileNotFoundError:
                continue
            except ValueError as error:
                damage = error
        if damage is None:
            raise _unknown(candidates_id)
        remedy = f"these candidates are damaged ({damage}); ask for the same candidates again"
        raise InputError("candidates", candidates_id, remedy, status=422) from damage

    def answer(
        self, candidates_id: str, *, ranking: object = None, ratings: object = None, who: str = ""
    ) -> Entry:
        """Keep what somebody said of candidates; an earlier answer goes to the history.

        Args:
            candidates_id: From `put_candidates`.
            ranking: Indices of all candidates, best first, as sent; or
            ratings: a number from 1 to 5 for each candidate, higher is better, as sent.
            who: Who says so.

        Raises:
            InputError: When the answer is malformed; (404) when there are no such candidates; (422) when
                their file is damaged.
        """
        with self._lock:
            entry = self.find(candidates_id)
            count = len(entry.asked.candidates.masks)
            if (ranking is None) == (ratings is None):
                sent = None if ranking is None else "both"
                raise InputError("ranking, ratings", sent, "send one of the two")
            answer = Answer(
                ranking=None if ranking is None else _ranking(ranking, count),
                ratings=None if ratings is None else _ratings(ratings, count),
                who=who,
                when=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            )
            entry = replace(entry, answer=answer)
            path = self._case(entry.asked.image_id) / f"{candidates_id}{_SUFFIX}"
            self._keep(path)
            write_atomic(path, packed(entry))
            self._waiting(candidates_id).unlink(missing_ok=True)
            return entry

    def remove(self, image_id: str) -> bool:
        """Take a case's candidates away, rated and waiting; whether any were rated."""
        with self._lock:
            folder = self._case(image_id)
            rated = list(folder.glob(f"[!.]*{_SUFFIX}"))
            for path in rated:
                self._keep(path)
                path.unlink(missing_ok=True)
            with suppress(OSError):  # not there, or something else lies in it
                folder.rmdir()
            for path in self._pending.glob(f"[!.]*{_SUFFIX}"):
                with suppress(FileNotFoundError, ValueError):
                    if unpacked(path.read_bytes()).asked.image_id == image_id:
                        path.unlink()
            return bool(rated)

    def _case(self, image_id: str) -> Path:
        return self.folder / check_image_id(image_id)

    def _waiting(self, candidates_id: str) -> Path:
        return self._pending / f"{candidates_id}{_SUFFIX}"

    def _keep(self, path: Path) -> None:
        if path.is_file():
            copy_atomic(path, self._history / path.parent.name / f"{path.stem}.{time.time_ns()}{_SUFFIX}")


def _unknown(candidates_id: str) -> InputError:
    remedy = f"no such candidates; ask for new ones, the {MAX_PENDING} newest wait for an answer"
    return InputError("candidates", candidates_id, remedy, status=404)


def _ranking(sent: object, count: int) -> tuple[int, ...]:
    plain = isinstance(sent, list | tuple) and all(type(n) is int for n in sent)
    if not plain or sorted(sent) != list(range(count)):  # type: ignore[call-overload]
        remedy = f"send each of the candidates 0 to {count - 1} once, best first"
        raise InputError("ranking", sent, remedy)
    return tuple(sent)  # type: ignore[arg-type]


def _ratings(sent: object, count: int) -> tuple[int, ...]:
    low, high = RATINGS
    plain = isinstance(sent, list | tuple) and len(sent) == count
    if not plain or not all(type(n) is int and low <= n <= high for n in sent):  # type: ignore[attr-defined]
        remedy = f"send a whole number from {low} (worst) to {high} for each of the {count} candidates"
        raise InputError("ratings", sent, remedy)
    return tuple(sent)  # type: ignore[arg-type]
