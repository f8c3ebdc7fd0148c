"""The local datastore: checked names and files, atomic writes, recovery, nothing accepted ever lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from watchdog.events import FileSystemEvent

from apps.samloop.incoming import check_id, check_tag, is_id
from apps.samloop.labelinfo import index_of_value
from sam_infer.errors import InputError
from sam_infer.files import copy_atomic, sweep, write_atomic
from sam_infer.volumes import (
    EXTENSIONS,
    NIFTI,
    NRRD,
    extension,
    fit_labelmap,
    labelmap_bytes,
    read_image,
    stem,
)

logger = logging.getLogger(__name__)

#: What the application keeps beside the images: models, history of labels, damaged indexes.
HOME = ".samloop"
Objects = dict[str, ImageLabelModel]


class SafeDatastore(LocalDatastore):
    """MONAI Label's local datastore, made safe.

    - The index and every file are written to a temporary name, synced, and moved into place.
    - Each change starts from the index as it is on disk, since batch inference writes it too, and becomes
      visible as a whole: readers need no lock.
    - A damaged index is set aside and rebuilt from the files instead of refusing to start.
    - A label or image that is replaced or removed goes to ``.samloop/history``, and not before what replaces
      it is there.
    - Labels must be readable, of the image's shape, with values among the project's labels.

    Args:
        folder: The studies folder.
        labels: Label name -> index of the project.
        auto_reload: Watch the folder for files that come and go.
        read_only: Do not reconcile the index with the files.
    """

    _datastore: LocalDatastoreModel

    def __init__(
        self, folder: str, *, labels: dict[str, int], auto_reload: bool = True, read_only: bool = False
    ) -> None:
        self._mutex = threading.RLock()
        self._file_lock = FileLock(str(Path(folder, ".lock")))
        self._label_indices = labels
        self._loaded: tuple[int, int] | None = None
        self._unserved: set[str] = set()
        for place in (Path(folder), *Path(folder, "labels").glob("*")):
            sweep(place)
        super().__init__(
            folder,
            extensions=[f"*{e}" for e in EXTENSIONS if e != ".seg.nrrd"],
            auto_reload=auto_reload,
            read_only=read_only,
        )
        if auto_reload:
            self._handler.on_moved = self._on_moved

    # Index

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among threads and processes, with the index as it is on disk."""
        with self._mutex, self._file_lock:
            self._load()
            yield

    @contextmanager
    def _changing(self) -> Iterator[Objects]:
        """The index's objects, to be changed in place (their values replaced); written at the end."""
        with self._locked():
            objects = dict(self._datastore.objects)
            yield objects
            changed = self._datastore.model_copy(update={"objects": objects})
            self._write(changed)
            self._datastore = changed

    def _load(self) -> None:
        path = Path(self._datastore_config_path)
        try:
            stat = path.stat()
        except FileNotFoundError:
            return
        if self._loaded == (stat.st_mtime_ns, stat.st_ino):
            return
        try:
            found = LocalDatastoreModel.model_validate_json(path.read_bytes())
        except ValueError as error:
            aside = Path(self._datastore_path, HOME, f"datastore_v2.{time.time_ns()}.damaged.json")
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.replace(aside)
            logger.error("The index was damaged (%s); moved to %s, rebuilt from the files", error, aside)
            self._loaded = None
            return
        found.base_path = self._datastore_path
        self._datastore = found
        self._loaded = (stat.st_mtime_ns, stat.st_ino)

    def _write(self, model: LocalDatastoreModel) -> None:
        path = Path(self._datastore_config_path)
        content = model.model_dump(exclude={"base_path"})
        write_atomic(path, json.dumps(content, default=str, allow_nan=False, ensure_ascii=False).encode())
        stat = path.stat()
        self._loaded = (stat.st_mtime_ns, stat.st_ino)

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._locked():
            pass

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._mutex, self._file_lock:
            self._write(self._datastore)

    def _reconcile_datastore(self) -> None:
        """Make the index say what the folders hold; what it knows of files that are still there stays."""
        with self._locked():
            images = self._files(Path(self._datastore.image_path()))
            tags = [f.name for f in Path(self._datastore.label_path(None)).iterdir() if f.is_dir()]
            labels = {tag: self._files(Path(self._datastore.label_path(tag))) for tag in tags}
            before = self._datastore.objects
            objects: Objects = {}
            for name in [n for n in before if n in images] + [n for n in images if n not in before]:
                known = before.get(name)
                objects[name] = ImageLabelModel(
                    image=_entry(name, images[name], known.image if known else None),
                    labels={
                        tag: _entry(name, files[name], known.labels.get(tag) if known else None)
                        for tag, files in labels.items()
                        if name in files
                    },
                )
            if objects != before:
                with self._changing() as current:
                    current.clear()
                    current.update(objects)

    def _files(self, folder: Path) -> dict[str, list[str]]:
        """Extensions by id of the images, or labels, in a folder, the newest first."""
        found: dict[str, list[str]] = {}
        for file in sorted(folder.iterdir()):
            if extension(file) and file.is_file() and self._servable(file):
                found.setdefault(stem(file), []).append(file.name[len(stem(file)) :])
        for name, kinds in found.items():
            if len(kinds) > 1:
                kinds.sort(key=lambda kind: -_modified(folder / f"{name}{kind}"))
                self._warn(folder / f"{name}{kinds[1]}", f"{name}{kinds[0]} has the same id and is newer")
        return found

    def _servable(self, file: Path) -> bool:
        if not is_id(stem(file)):
            if not file.name.startswith("."):
                self._warn(file, "its name cannot be an id, rename it")
            return False
        return True

    def _warn(self, file: Path, reason: str) -> None:
        if str(file) not in self._unserved:
            self._unserved.add(str(file))
            logger.warning("Not served: %s (%s)", file, reason)

    def _on_moved(self, event: FileSystemEvent) -> None:
        if event.dest_path == self._datastore_config_path:
            self._init_from_datastore_file()
        else:
            self.refresh()

    def _to_id(self, file: str) -> tuple[str, str]:
        return stem(file), file[len(stem(file)) :]

    # Images

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """What is known of an image.

        Raises:
            ImageNotFoundException: When there is no such image.
        """
        _object(self._datastore.objects, image_id)
        return dict(super().get_image_info(image_id))

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an image, or replace one of the same shape; its labels stay, its file goes to the history."""
        image_id = check_id("image", image_id or stem(image_filename))
        image = read_image(image_filename, argument="file")
        kind = extension(image_filename)
        folder = Path(self._datastore.image_path())
        with self._locked():
            known = self._datastore.objects.get(image_id)
            if known is not None and known.labels:
                before = read_image(self.get_image_uri(image_id))
                if before.shape != image.shape:
                    raise InputError(
                        "image",
                        image_id,
                        f"has labels of shape {before.shape} and the new image has {image.shape}; "
                        "choose another id",
                        status=409,
                    )
            old = {folder / f"{image_id}{kind}"}
            if known is not None:
                old.add(folder / f"{image_id}{known.image.ext}")
            for path in old:
                self._keep(path, "images")
            with self._changing() as objects:
                copy_atomic(Path(image_filename), folder / f"{image_id}{kind}")
                objects[image_id] = ImageLabelModel(
                    image=_entry(image_id, [kind], None, image_info), labels=known.labels if known else {}
                )
            for path in old - {folder / f"{image_id}{kind}"}:
                path.unlink(missing_ok=True)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Take an image and its labels out of the index; the files go to the history."""
        with self._changing() as objects:
            known = _object(objects, image_id)
            gone = [(Path(self.get_image_uri(image_id)), "images")]
            gone += [(Path(self.get_label_uri(image_id, tag)), tag) for tag in known.labels]
            for path, kind in gone:
                self._keep(path, kind)
            for path, _ in gone:
                path.unlink(missing_ok=True)
            del objects[image_id]

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into an image's info."""
        with self._changing() as objects:
            known = _object(objects, image_id)
            objects[image_id] = known.model_copy(update={"image": _merged(known.image, info)})

    # Labels

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What is known of a label.

        Raises:
            LabelNotFoundException: When there is no such label.
        """
        return dict(_label(self._datastore.objects, label_id, label_tag).info)

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Save a label; the one that it replaces goes to the history.

        ``label_info["label_info"]`` names the file's values; they are stored as the project's indices.

        Raises:
            ImageNotFoundException: When there is no such image.
            InputError: When the file is not a label map of the image, or holds unknown values.
        """
        check_tag(label_tag)
        _object(self._datastore.objects, image_id)
        content, kind = self._fit(image_id, Path(label_filename), label_info.get("label_info"))
        folder = Path(self._datastore.label_path(label_tag))
        with self._locked():
            before = _object(self._datastore.objects, image_id).labels.get(label_tag)
            if before is not None:
                self._keep(folder / f"{image_id}{before.ext}", label_tag)
            with self._changing() as objects:
                if content is None:
                    copy_atomic(Path(label_filename), folder / f"{image_id}{kind}")
                else:
                    write_atomic(folder / f"{image_id}{kind}", content)
                known = _object(objects, image_id)
                entry = _entry(image_id, [kind], None, label_info)
                objects[image_id] = known.model_copy(update={"labels": {**known.labels, label_tag: entry}})
            if before is not None and before.ext != kind:
                (folder / f"{image_id}{before.ext}").unlink(missing_ok=True)
        return image_id

    def _fit(self, image_id: str, path: Path, label_info: object) -> tuple[bytes | None, str]:
        """Check a label file against its image; rewritten where it does not lie on it or has other values.

        Returns:
            New content, or None where the file can be taken as it is; and the extension to store it under.
        """
        image = read_image(self.get_image_uri(image_id))
        values, fits = fit_labelmap(path, image)
        present, where = np.unique(values, return_inverse=True)
        mapping = index_of_value(present.tolist(), label_info, self._label_indices)
        kind = extension(path)
        if fits and all(value == index for value, index in mapping.items()):
            return None, kind
        indices = np.array([mapping.get(int(value), 0) for value in present], np.uint8)
        kind = ".nrrd" if kind in NRRD else kind if kind in NIFTI else ".png"
        return labelmap_bytes(indices[where].reshape(values.shape), image.affine, kind), kind

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label out of the index; its file goes to the history.

        Raises:
            LabelNotFoundException: When there is no such label.
        """
        with self._changing() as objects:
            known = _object(objects, label_id)
            path = Path(self._datastore.label_path(label_tag))
            path /= f"{label_id}{_label(objects, label_id, label_tag).ext}"
            self._keep(path, label_tag)
            path.unlink(missing_ok=True)
            left = {tag: entry for tag, entry in known.labels.items() if tag != label_tag}
            objects[label_id] = known.model_copy(update={"labels": left})

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into a label's info."""
        with self._changing() as objects:
            entry = _merged(_label(objects, label_id, label_tag), info)
            known = objects[label_id]
            objects[label_id] = known.model_copy(update={"labels": {**known.labels, label_tag: entry}})

    def _keep(self, path: Path, kind: str) -> None:
        """Put a file that is about to be replaced or removed into the history too."""
        if not path.is_file():
            return
        name = f"{stem(path)}.{time.time_ns()}{extension(path)}"
        target = Path(self._datastore_path, HOME, "history", kind, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _entry(
    name: str, kinds: list[str], known: DataModel | None, info: dict[str, Any] | None = None
) -> DataModel:
    """What the index says of a file: what it knew, where one of the extensions found is the one it knew."""
    if known is not None and known.ext in kinds:
        return known
    return DataModel(ext=kinds[0], info={**(info or {}), "ts": int(time.time()), "name": f"{name}{kinds[0]}"})


def _merged(entry: DataModel, info: dict[str, Any]) -> DataModel:
    return DataModel(ext=entry.ext, info={**entry.info, **info})


def _object(objects: Objects, image_id: str) -> ImageLabelModel:
    if image_id not in objects:
        raise ImageNotFoundException(f"Image {image_id} not found")
    return objects[image_id]


def _label(objects: Objects, image_id: str, tag: str) -> DataModel:
    label = _object(objects, image_id).labels.get(tag)
    if label is None:
        raise LabelNotFoundException(f"Label {image_id} of tag {tag} not found")
    return label
