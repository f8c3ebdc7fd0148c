"""The journal beside the store: every change of the index, one JSON line each, never rewritten.

It is the ledger of who accepted what, and the write-ahead log of the index: the index file may be older than
the store, the lines behind the place that it names say the rest. Each line has ``time`` (UTC), ``event`` and
``image``; lines about a label have ``tag`` too:

- saved: through the server or a training; ``who``, ``model``, ``sha256``, ``size``, ``info`` ...
- found, lost: a file that came, changed or went without the store.
- removed: by the store; the file is in the history.
- info: what was noted, ``info`` holds the new entries.
- earlier: a version from before there was a journal, ``file`` is its name in the history.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from sam_infer.files import sync

logger = logging.getLogger(__name__)

#: What the application keeps beside the images: models, the journal, the history, damaged indexes.
HOME = ".samloop"
NAME = "journal.jsonl"
Line = dict[str, Any]
_BLOCK = 1 << 16
_ACTING: ContextVar[str | None] = ContextVar("acting", default=None)


@contextmanager
def acting(user: str) -> Iterator[None]:
    """Within this, changes of the store are this user's, whatever an info says; "" = one who is not known."""
    token = _ACTING.set(user)
    try:
        yield
    finally:
        _ACTING.reset(token)


def line(event: str, image: str, tag: str | None = None, **facts: Any) -> Line:
    """A line of now; facts that are None are left out."""
    about = {"image": image, **({"tag": tag} if tag is not None else {})}
    told = {key: value for key, value in facts.items() if value is not None}
    return {"time": datetime.now(UTC).isoformat(), "event": event, **about, **told}


def said_by(info: Mapping[str, Any]) -> Line:
    """Who did it, as far as an info or the request tells.

    Args:
        info: ``user``, a name; ``client_id``, what the client calls itself.
    """
    acts, client = _ACTING.get(), info.get("client_id")
    return {"who": (info.get("user") if acts is None else acts) or client or None, "client": client}


def made_by(info: Mapping[str, Any]) -> Line:
    """The model that an info names, with its round and fingerprint where a reply's ``params`` tell them."""
    params, made = info.get("params"), info.get("provenance")
    told = params.get("model") if isinstance(params, dict) else None
    found: Line = {}
    for source in (made, told):
        if isinstance(source, dict):
            found |= {key: source[key] for key in ("round", "fingerprint") if source.get(key) is not None}
    return {**found, **({"model": info["model"]} if info.get("model") else {})}


class Journal:
    """Lines on disk.

    Writers hold the store's lock; readers meet whole lines only, since those who wait for the lock see
    nothing of a line that is being written.

    Args:
        path: The file; made on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self) -> int:
        """Bytes of the file; 0 where there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, content: bytes) -> int:
        """Add encoded lines, all or none of them, and sync them; the store's lock is held.

        Args:
            content: As `encoded` makes it.

        Returns:
            The file's size.

        Raises:
            OSError: When it cannot be written; the file is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("ab+", buffering=0) as file:
            start = self._mended(file)
            try:
                _write(file, content)
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # what is left of it then is cut off by the next line
                    file.truncate(start)
                raise
        if new:
            for folder in (self.path.parent, self.path.parent.parent):
                sync(folder)
        return start + len(content)

    def mend(self) -> int:
        """Cut off a line that a killed writer left unfinished, which was never answered; the lock is held.

        Returns:
            The file's size.
        """
        if not self.size():
            return 0
        with self.path.open("ab+", buffering=0) as file:
            return self._mended(file)

    def _mended(self, file: FileIO) -> int:
        end = _end_of_lines(file)
        if end != file.seek(0, os.SEEK_END):
            logger.warning("%s ended within a line, which is cut off", self.path)
            file.truncate(end)
        return end

    def read(self, start: int = 0, *, holding: str | None = None) -> Iterator[tuple[Line, int]]:
        """The whole lines behind a place, each with where it ends; those that are damaged are named and left.

        Args:
            start: A line's end, or 0.
            holding: Only lines that hold this text somewhere, as JSON.
        """
        sought = None if holding is None else encoded_text(holding)
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(start)
            for raw in file:
                start += len(raw)
                if not raw.endswith(b"\n"):
                    return
                if sought is not None and sought not in raw:
                    continue
                try:
                    found = json.loads(raw)
                    if not isinstance(found["event"], str) or not isinstance(found["image"], str):
                        raise TypeError("event and image are no texts")
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    logger.error("%s: the line that ends at byte %d is damaged: %s", self.path, start, error)
                    continue
                yield found, start

    def is_end(self, place: int) -> bool:
        """Whether a line ends at a place, or the file begins there."""
        if not place:
            return True
        try:
            with self.path.open("rb") as file:
                file.seek(place - 1)
                return file.read(1) == b"\n"
        except FileNotFoundError:
            return False


def encoded(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Lines as they are stored.

    Raises:
        ValueError: When they hold what JSON has no word for.
    """
    texts = (json.dumps(entry, default=str, allow_nan=False, ensure_ascii=False) for entry in lines)
    return "".join(f"{text}\n" for text in texts).encode()


def encoded_text(text: str) -> bytes:
    """A text as it stands in a stored line."""
    return json.dumps(text, ensure_ascii=False).encode()


def _write(file: FileIO, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _end_of_lines(file: FileIO) -> int:
    """Where the last whole line ends."""
    place = file.seek(0, os.SEEK_END)
    while place:
        start = max(0, place - _BLOCK)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0
