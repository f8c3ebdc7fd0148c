"""MONAI Label's local datastore over an index that a journal keeps: what is known of the files, and by whom.

Every change is a line of the journal, synced before it is answered, and then a new index in memory; the index
file is written now and then. Other processes (batch inference, trainings) append to the same journal: who
finds it longer than what it knows reads on. The index is replaced as a whole, so readers need no lock but to
read on.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag

from apps.samloop.history import History, recalled
from apps.samloop.incoming import is_tag
from apps.samloop.index import Index, Objects, apply, case_of, label_of, load, replay, save
from apps.samloop.journal import HOME, NAME, Journal, Line, encoded, line
from apps.samloop.reconcile import Differences, differences
from apps.samloop.studyfiles import Seen, StudyFiles
from apps.samloop.watch import Later, Watch
from sam_infer.errors import InputError
from sam_infer.files import sha256_of, sweep, sync
from sam_infer.volumes import EXTENSIONS, stem

logger = logging.getLogger(__name__)

#: Seconds from a change to the next writing of the index file; the journal has it at once.
INDEX_DELAY = 5.0


class IndexedDatastore(LocalDatastore):
    """What lies in a studies folder, and what the journal says of it.

    Args:
        folder: The studies folder.
        auto_reload: Watch the folder for files that come and go.
        read_only: Do not reconcile the index with the files.

    Raises:
        InputError: When the folder cannot be written, or its labels would be written elsewhere.
    """

    def __init__(self, folder: str, *, auto_reload: bool = True, read_only: bool = False) -> None:
        self._root = Path(os.path.realpath(folder))
        home = self._root / HOME
        self._mutex = threading.RLock()
        self._file_lock = FileLock(str(self._root / ".lock"))
        self._journal = Journal(home / NAME)
        self._history = History(home / "history")
        self._files = StudyFiles(self._root)
        self._state = (Index(name="", description=""), 0)
        self._stale = False
        #: Nothing is read on before the index is loaded, nor while this process writes the journal: then
        #: nobody else does, and readers need not wait for the disk.
        self._settled = False
        self._images = self._labels = self._root
        self._hashes: dict[tuple[str, str, Seen], str | None] = {}
        self._counted: tuple[Objects, dict[str, Any]] | None = None
        self._writing = Later(self._write_index, seconds=INDEX_DELAY)
        self._watch = Watch(self._touched)
        for pattern in ("", "labels/*", HOME, f"{HOME}/*", f"{HOME}/history/*", f"{HOME}/models/*"):
            for place in self._root.glob(pattern) if pattern else [self._root]:
                _check_writable(place)
                sweep(place)
        images = [f"*{e}" for e in EXTENSIONS if e != ".seg.nrrd"]
        super().__init__(str(self._root), extensions=images, auto_reload=False, read_only=read_only)
        if self._stale and not read_only:
            self._try(self._write_index)
        if auto_reload:
            poll = self._is_on_mount(str(self._root))
            self._watch.start(self._images, self._labels, poll=poll)

    def close(self) -> None:
        """Write what is still to be written, watch no more; the store goes on working."""
        self._watch.stop()
        self._writing.now()

    # Index

    @property
    def _datastore(self) -> LocalDatastoreModel:  # type: ignore[override]
        """The index with what other processes wrote by now."""
        if self._settled and self._journal.size() != self._state[1]:
            with self._locked():
                pass
        return self._state[0]

    @_datastore.setter
    def _datastore(self, index: LocalDatastoreModel) -> None:
        self._state = (Index.model_validate(index.model_dump()), 0)

    @property
    def _objects(self) -> Objects:
        self._datastore  # noqa: B018 - reads on
        return self._state[0].objects

    @contextmanager
    def _locked(self) -> Iterator[Objects]:
        """Alone among threads and processes; gives the index's objects as they are now."""
        with self._mutex, self._file_lock:
            self._read_on()
            yield self._state[0].objects

    def _read_on(self) -> None:
        size = self._journal.size()
        index, at = self._state
        if size == at:
            return
        if size < at:
            logger.error("%s is shorter than it was", self._journal.path)
            self._state = (index, size)
            return
        objects = dict(index.objects)
        end = replay(objects, self._journal, at)
        self._publish(objects, end)
        if end != size:
            self._try(self._journal.mend)

    def _publish(self, objects: Objects, at: int) -> None:
        self._state = (self._state[0].model_copy(update={"objects": objects}), at)

    def _record(self, content: bytes) -> None:
        """Put encoded lines into the journal, and then into the index; the lock is held."""
        self._settled = False
        try:
            end = self._journal.append(content)
            objects = dict(self._state[0].objects)
            for text in content.split(b"\n")[:-1]:
                apply(objects, json.loads(text))
            self._publish(objects, end)
        finally:
            self._settled = True
        self._writing.ask()

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._mutex, self._file_lock:
            self._try(self._journal.mend)
            path, home = Path(self._datastore_config_path), self._journal.path.parent
            loaded = load(path, self._journal, self._state[0], home)
            self._state, self._stale, self._settled = (loaded.index, loaded.at), loaded.stale, True
            self._images = self.check_inside(Path(os.path.normpath(loaded.index.image_path())))
            self._labels = self.check_inside(Path(os.path.normpath(loaded.index.label_path(None))))
            lines: list[Line] = []
            if loaded.foreign or not loaded.at:
                lines += self._history.unrecorded(self._journal)
            if loaded.foreign:
                images = ((name, case.image) for name, case in loaded.index.objects.items())
                lines += [line("found", name, ext=image.ext, info=image.info) for name, image in images]
            if lines:
                self._try(lambda: self._record(encoded(lines)))

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._write_index()

    def _write_index(self) -> None:
        index, at = self._state
        if self._root.is_dir():
            save(Path(self._datastore_config_path), index, at)

    def _try(self, call: Any) -> None:
        """Do what can wait for a disk that is full or read-only now."""
        try:
            call()
        except OSError as error:
            logger.error("Not written: %s", error)

    # Folders

    def check_inside(self, folder: Path) -> Path:
        """A folder that is written to.

        Raises:
            InputError: When it is a link out of the studies folder.
        """
        if not self._files.is_inside(folder):
            remedy = f"leads out of the studies folder, and files are written inside {self._root} only"
            raise InputError("studies", str(folder), remedy, status=409)
        return folder

    def _reconcile_datastore(self) -> None:
        """Make the index say what the folders hold; what it knows of files that are still there stays."""
        if self._state[1] and not self._journal.size():
            logger.error(
                "%s is gone, so the folder may be; nothing is taken out of the index", self._journal.path
            )
            return
        try:
            if not self._differences(self._objects):  # which reads new labels, and needs no lock for it
                return
            with self._locked() as objects:
                found = self._differences(objects)
                self._take(found)
        finally:
            self._hashes.clear()

    def _differences(self, objects: Objects) -> Differences:
        folders = (f for f in self._labels.iterdir() if f.is_dir() and self._files.is_inside(f))
        tags = [folder.name for folder in folders if is_tag(folder.name)]
        return differences(
            objects,
            self._files.images(self._images),
            {tag: self._files.labels(self._labels / tag) for tag in sorted(tags)},
            hashed=self._hashed,
            recall=functools.cache(lambda: recalled(self._journal)),
        )

    def _hashed(self, name: str, tag: str, seen: Seen) -> str | None:
        key = (name, tag, seen)
        if key not in self._hashes:
            self._hashes[key] = sha256_of(self._labels / tag / f"{name}{seen.ext}")
        return self._hashes[key]

    def _take(self, found: Differences) -> None:
        """Carry out what the folders say; the lock is held."""
        lines = list(found.lines)
        aside = [(name, tag, seen) for name, tag, seen in found.second if self._hashed(name, tag, seen)]
        lines += [self._kept_aside(*second) for second in aside]
        if lines:
            content = encoded(lines)
            try:
                self._record(content)
            except OSError as error:  # the disk is full: the next look finds the same
                logger.error("The journal cannot be written: %s", error)
                objects = dict(self._state[0].objects)
                for entry in lines:
                    apply(objects, entry)
                self._publish(objects, self._state[1])
        for name, tag, seen in aside:
            (self._labels / tag / f"{name}{seen.ext}").unlink()
            sync(self._labels / tag)
        objects = dict(self._state[0].objects)
        for name, tag, seen in found.touched:
            case = objects[name]
            entry = case.labels[tag].model_copy(update={"size": seen.size, "mtime_ns": seen.mtime_ns})
            objects[name] = case.model_copy(update={"labels": {**case.labels, tag: entry}})
        self._publish(objects, self._state[1])
        self._stale = True

    def _kept_aside(self, name: str, tag: str, seen: Seen) -> Line:
        """Keep a label file whose id another one has in the history: what a killed save left, or a copy."""
        path = self._labels / tag / f"{name}{seen.ext}"
        sha256 = self._hashed(name, tag, seen)
        kept = self._history.keep(path, tag, str(sha256))
        logger.warning("%s has the id of another label file; it is %s in the history now", path, kept)
        return line("earlier", name, tag, sha256=sha256, size=seen.size, file=kept)

    def _touched(self, paths: set[Path]) -> None:
        """Look at the folders, unless all that came or went is known: what the store itself wrote."""
        if not all(map(self._is_known, paths)):
            self.refresh()

    def _is_known(self, path: Path) -> bool:
        name, ext = self._to_id(path.name)
        case = self._objects.get(name)
        try:
            stat = path.stat()
        except OSError:
            stat = None
        if path.parent == self._images:
            return (stat is not None) == (case is not None and case.image.ext == ext)
        entry = case.labels.get(path.parent.name) if case else None
        if stat is None or entry is None or entry.ext != ext:
            return stat is None and (entry is None or entry.ext != ext)
        return (entry.size, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    def _to_id(self, file: str) -> tuple[str, str]:
        return stem(file), file[len(stem(file)) :]

    # What is known

    def status(self) -> dict[str, Any]:
        """How many images there are, how many are accepted, and how many labels each tag has."""
        objects = self._objects
        if self._counted is None or self._counted[0] is not objects:
            tags: dict[str, int] = {}
            for case in objects.values():
                for tag in case.labels:
                    tags[tag] = tags.get(tag, 0) + 1
            completed = tags.get(DefaultLabelTag.FINAL.value, 0)
            self._counted = objects, {"total": len(objects), "completed": completed, "label_tags": tags}
        return copy.deepcopy(self._counted[1])

    def json(self) -> dict[str, Any]:
        """The index as MONAI Label writes it."""
        return self._datastore.model_dump(exclude={"base_path", "journal"}, exclude_none=True)

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """The accepted cases: {"image": path, "label": path} each; relative ones if not full."""
        final = DefaultLabelTag.FINAL.value
        images, labels = self._images, self._labels / final
        if not full_path:
            images, labels = images.relative_to(self._root), labels.relative_to(self._root)
        return [
            {
                "image": str(images / f"{name}{case.image.ext}"),
                "label": str(labels / f"{name}{case.labels[final].ext}"),
            }
            for name, case in self._objects.items()
            if final in case.labels
        ]

    def get_image_uri(self, image_id: str) -> str:
        """The file of an image; "" where there is none."""
        case = self._objects.get(image_id)
        return f"{self._images}/{image_id}{case.image.ext}" if case else ""

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image.

        Raises:
            ImageNotFoundException: When there is no such image.
        """
        image = case_of(self._objects, image_id).image
        return {**_own_copy(image.info), "path": f"{self._images}/{image_id}{image.ext}"}

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The file of a label; "" where there is none."""
        case = self._objects.get(label_id)
        entry = case.labels.get(label_tag) if case else None
        return str(self._labels / label_tag / f"{label_id}{entry.ext}") if entry else ""

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known of a label.

        Raises:
            ImageNotFoundException: When there is no such image.
            LabelNotFoundException: When it has no such label.
        """
        return _own_copy(label_of(self._objects, label_id, label_tag).info)


def _own_copy(info: dict[str, Any]) -> dict[str, Any]:
    """A copy that its owner may change; most values are plain, and thousands are asked for at once."""
    return {key: copy.deepcopy(v) if isinstance(v, dict | list) else v for key, v in info.items()}


def _check_writable(folder: Path) -> None:
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        remedy = "this user cannot write there, and labels, models and the journal are kept in it; let it"
        raise InputError("studies", str(folder), remedy, status=409)
