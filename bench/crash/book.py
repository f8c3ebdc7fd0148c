"""What was answered before a kill, and whether it is all still there."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apps.samloop.journal import HOME, NAME, Journal
from apps.samloop.store import SafeDatastore
from bench.store import LABELS
from sam_infer.files import sha256_of

Key = tuple[str, str]
#: What a kill must leave none of.
TROUBLES = (
    "starts refused",
    "indexes damaged",
    "labels lost",
    "versions lost",
    "notes lost",
    "images lost",
    "journal lines missing",
    "journal lines damaged",
    "temporary files left",
    "models damaged",
    "models without a line",
)


@dataclass
class Book:
    """The answered changes of a folder's labels, by (image, tag).

    Args:
        labels: Content's hash of the label in force; None where it was removed.
        notes: The last note of each label in force.
        fresh: Versions that were not looked for yet: (image, tag, sha256).
        seen: Those that were.
        doing: What was asked for and not answered: it may have happened, or not.
        answered: How many changes.
    """

    labels: dict[Key, str | None] = field(default_factory=dict)
    notes: dict[Key, int | None] = field(default_factory=dict)
    fresh: list[tuple[str, str, str]] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    doing: set[Key] = field(default_factory=set)
    answered: int = 0

    def take(self, told: dict[str, Any]) -> None:
        """Note what a writer says: what it asks for, and the same with ``done`` once it has the answer."""
        key = (told["image"], told["tag"])
        if "done" not in told:
            self.doing.add(key)
            return
        self.doing.discard(key)
        self.answered += 1
        if told["done"] == "noted":
            self.notes[key] = told["note"]
            return
        self.labels[key], self.notes[key] = told["sha256"], None
        if told["sha256"] is not None:
            self.fresh.append((*key, told["sha256"]))


def look(folder: Path, book: Book, images: int) -> tuple[Counter[str], Book]:
    """Start a store over a folder whose writers were killed, and compare it with the book.

    Args:
        folder: The studies folder.
        book: What was answered.
        images: How many images there must be.

    Returns:
        How often each trouble was met; the book as the store is now.
    """
    found: Counter[str] = Counter()
    found["indexes damaged"] += not _is_whole(folder / "datastore_v2.json")
    _make_old(folder)
    try:
        store = SafeDatastore(str(folder), labels=LABELS, auto_reload=False)
    except Exception as error:
        print(f"the start was refused: {error!r}", flush=True)
        found["starts refused"] += 1
        return found, book
    found["indexes damaged"] += len(list((folder / HOME).glob("*.damaged.json")))
    found["images lost"] += images - len(store.list_images())
    found["temporary files left"] += sum(1 for _ in folder.rglob("*.tmp"))
    for key, sha256 in book.labels.items():
        uri = store.get_label_uri(*key)
        now = sha256_of(Path(uri)) if uri else None
        if key not in book.doing:
            found["labels lost"] += now != sha256
            note = store.get_label_info(*key).get("note") if uri else None
            found["notes lost"] += note != book.notes[key]
    recorded = _recorded(Journal(folder / HOME / NAME), found)
    for image, tag, sha256 in book.fresh:
        found["journal lines missing"] += (image, tag, sha256) not in recorded
        try:
            store.label_version(image, tag, sha256)
        except ValueError:
            found["versions lost"] += 1
    for key in book.doing:
        uri = store.get_label_uri(*key)
        book.labels[key] = sha256_of(Path(uri)) if uri else None
        book.notes[key] = store.get_label_info(*key).get("note") if uri else None
    seen = [*book.seen, *book.fresh]
    return found, Book(labels=book.labels, notes=book.notes, seen=seen, answered=book.answered)


def look_again(folder: Path, book: Book, images: int) -> Counter[str]:
    """The same at the end, for every version that was ever saved."""
    return look(folder, replace(book, fresh=book.seen, seen=[]), images)[0]


def _recorded(journal: Journal, found: Counter[str]) -> set[tuple[str, str, str]]:
    lines = [line for line, _ in journal.read()]
    found["journal lines damaged"] += journal.path.read_bytes().count(b"\n") - len(lines)
    return {(line["image"], line.get("tag", ""), line.get("sha256", "")) for line in lines}


def _is_whole(index: Path) -> bool:
    try:
        return isinstance(json.loads(index.read_bytes())["objects"], dict)
    except FileNotFoundError:
        return True  # killed before the first was written
    except (ValueError, KeyError, TypeError):
        return False


def _make_old(folder: Path) -> None:
    """As if the kill was some hours ago: temporary files of this minute could be another process's."""
    for file in folder.rglob("*.tmp"):
        os.utime(file, (time.time() - 7200,) * 2)
