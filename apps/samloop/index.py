"""The index of the store: MONAI Label's ``datastore_v2.json``, and how lines of the journal change it.

The file is written now and then; ``journal`` in it is the place in the journal up to which it knows.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from pydantic import Field, ValidationError

from apps.samloop.incoming import is_tag
from apps.samloop.journal import Journal, Line
from apps.samloop.studyfiles import is_name
from sam_infer.files import write_atomic
from sam_infer.volumes import EXTENSIONS

logger = logging.getLogger(__name__)


class Entry(DataModel):
    """What the index says of a file: its extension, its info, and what it was when the store last saw it.

    Another program that writes the index drops the last three.
    """

    sha256: str | None = None
    size: int | None = None
    mtime_ns: int | None = None


class Case(ImageLabelModel):
    """An image and its labels by tag. It is never changed, but replaced."""

    image: Entry
    labels: dict[str, Entry] = Field(default_factory=dict)


Objects = dict[str, Case]


class Index(LocalDatastoreModel):
    """The index; ``objects`` is never changed, but replaced, so that readers need no lock."""

    objects: Objects = Field(default_factory=dict)
    journal: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An index as it was found.

    Args:
        index: It, with what the journal adds.
        at: The place in the journal up to which it knows.
        stale: Whether the file should be written anew.
        foreign: Whether the journal does not hold what the index says.
    """

    index: Index
    at: int
    stale: bool
    foreign: bool


def load(path: Path, journal: Journal, empty: Index, aside: Path) -> Loaded:
    """Read the index file and what the journal says beyond it; a damaged file is set aside, not refused.

    Without a usable file all that the journal says is the index. One that another program wrote knows no
    place in the journal, or the journal was lost: it is taken as it is, its files are to be looked at.

    Args:
        path: The index file.
        journal: The journal beside it.
        empty: What the index is where there is none.
        aside: Folder for a damaged file.
    """
    index: Index = empty
    told: int | None = 0
    with _no_collections():
        try:
            index = Index.model_validate_json(path.read_bytes())
            told = index.journal
        except FileNotFoundError:
            pass
        except ValueError as error:
            kept = aside / f"datastore_v2.{time.time_ns()}.damaged.json"
            aside.mkdir(parents=True, exist_ok=True)
            path.replace(kept)
            logger.error("The index was damaged (%s); moved to %s, journal and files tell", error, kept)
        index.base_path = empty.base_path
        objects = {name: _plain(case) for name, case in index.objects.items() if _is_file(name, case.image)}
        foreign = told is None or told > journal.size() or not journal.is_end(told)
        if foreign:
            logger.warning("%s does not know what %s says; the files are looked at", journal.path, path)
            objects = {name: _unseen(case) for name, case in objects.items()}
        end = replay(objects, journal, journal.size() if foreign else told or 0)
    index = index.model_copy(update={"objects": objects})
    return Loaded(index=index, at=end, stale=end != told, foreign=foreign)


def save(path: Path, index: Index, at: int) -> None:
    """Write the index file, whole or not at all."""
    known = index.model_copy(update={"journal": at})
    write_atomic(path, known.model_dump_json(exclude={"base_path"}, exclude_none=True).encode())


def replay(objects: Objects, journal: Journal, start: int) -> int:
    """Apply the journal's lines behind a place to objects that nobody else sees; returns where they end."""
    end = start
    for line, end in journal.read(start):
        try:
            apply(objects, line)
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            logger.error("%s: the line that ends at byte %d means nothing: %r", journal.path, end, error)
    return end


def apply(objects: Objects, line: Line) -> None:
    """Change objects as a line of the journal says; their cases are replaced, not changed."""
    name, tag, event = line["image"], line.get("tag"), line["event"]
    known = objects.get(name)
    if event in ("saved", "found"):
        seen = {key: line.get(key) for key in ("sha256", "size", "mtime_ns")}
        entry = Entry(ext=line["ext"], info=line["info"], **seen)
        if tag is None:
            objects[name] = Case(image=entry, labels=known.labels if known else {})
        elif known is not None:
            objects[name] = known.model_copy(update={"labels": {**known.labels, tag: entry}})
    elif known is None:
        return
    elif event in ("removed", "lost"):
        if tag is None:
            del objects[name]
        else:
            left = {other: entry for other, entry in known.labels.items() if other != tag}
            objects[name] = known.model_copy(update={"labels": left})
    elif event == "info":
        if tag is None:
            objects[name] = known.model_copy(update={"image": _noted(known.image, line["info"])})
        elif tag in known.labels:
            entry = _noted(known.labels[tag], line["info"])
            objects[name] = known.model_copy(update={"labels": {**known.labels, tag: entry}})


def case_of(objects: Objects, image_id: str) -> Case:
    """What is known of an image.

    Raises:
        ImageNotFoundException: When there is no such image.
    """
    if image_id not in objects:
        raise ImageNotFoundException(f"Image {image_id} not found")
    return objects[image_id]


def label_of(objects: Objects, image_id: str, tag: str) -> Entry:
    """What is known of a label.

    Raises:
        ImageNotFoundException: When there is no such image.
        LabelNotFoundException: When it has no such label.
    """
    label = case_of(objects, image_id).labels.get(tag)
    if label is None:
        raise LabelNotFoundException(f"Label {image_id} of tag {tag} not found")
    return label


def _noted(entry: Entry, info: dict[str, Any]) -> Entry:
    return entry.model_copy(update={"info": {**entry.info, **info}})


def _is_file(name: str, entry: Entry) -> bool:
    """Whether what an index file names can be a file of the store."""
    return is_name(name) and entry.ext.lower() in EXTENSIONS


def _plain(case: Case) -> Case:
    labels = {tag: e for tag, e in case.labels.items() if is_tag(tag) and e.ext.lower() in EXTENSIONS}
    return case if len(labels) == len(case.labels) else case.model_copy(update={"labels": labels})


def _unseen(case: Case) -> Case:
    """As if the store had never looked at the labels' files."""
    labels = {tag: Entry(ext=entry.ext, info=entry.info) for tag, entry in case.labels.items()}
    return case.model_copy(update={"labels": labels})


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without the garbage collector, which takes most of the time in which many objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
