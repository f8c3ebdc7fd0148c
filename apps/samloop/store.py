"""The local datastore: checked names and files, atomic writes, recovery, nothing accepted ever lost."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException
from watchdog.events import FileSystemEvent

from apps.samloop.labelinfo import index_of_value
from sam_infer.errors import InputError
from sam_infer.files import copy_atomic, write_atomic
from sam_infer.volumes import (
    EXTENSIONS,
    NIFTI,
    NRRD,
    extension,
    labelmap_bytes,
    read_image,
    read_labelmap,
    stem,
)

logger = logging.getLogger(__name__)

#: What the application keeps beside the images: models, history of labels, damaged indexes.
HOME = ".samloop"
_NAME = re.compile(r"[^\x00-\x1f/\\:*?\"<>|]{1,200}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_id(argument: str, value: str) -> str:
    """An image or label id that cannot leave the store.

    Raises:
        InputError: When it is empty, too long, starts with a dot or holds a path separator.
    """
    if not _NAME.fullmatch(value) or value.startswith(".") or value != value.strip():
        raise InputError(
            argument,
            value,
            "send an id without path separators, 1 to 200 characters, not starting with a dot",
        )
    return value


def check_tag(value: str) -> str:
    """A label tag that cannot leave the store.

    Raises:
        InputError: When it is anything but letters, digits, dot, dash and underscore.
    """
    if not _TAG.fullmatch(value):
        raise InputError("tag", value, "send letters, digits, '.', '-' and '_' only, 64 at most")
    return value


class SafeDatastore(LocalDatastore):
    """MONAI Label's local datastore, made safe.

    - The index and every file are written to a temporary name, synced, and moved into place.
    - A damaged index is set aside and rebuilt from the files instead of refusing to start.
    - A label that is replaced or removed is moved to ``.samloop/history``.
    - Labels must be readable, of the image's shape, with values among the project's labels.

    Args:
        folder: The studies folder.
        labels: Label name -> index of the project.
        auto_reload: Watch the folder for files that come and go.
        read_only: Do not reconcile the index with the files.
    """

    def __init__(
        self, folder: str, *, labels: dict[str, int], auto_reload: bool = True, read_only: bool = False
    ) -> None:
        self._mutex = threading.RLock()
        self._label_indices = labels
        super().__init__(
            folder,
            extensions=[f"*{e}" for e in EXTENSIONS if e != ".seg.nrrd"],
            auto_reload=auto_reload,
            read_only=read_only,
        )
        if auto_reload:
            self._handler.on_moved = self._on_moved

    # Index

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        with self._mutex:
            try:
                super()._init_from_datastore_file(throw_exception=True)
            except (ValueError, OSError) as error:
                aside = Path(self._datastore_path, HOME, f"datastore_v2.{time.time_ns()}.damaged.json")
                aside.parent.mkdir(parents=True, exist_ok=True)
                Path(self._datastore_config_path).replace(aside)
                logger.error("The index was damaged (%s); moved to %s, rebuilt from the files", error, aside)
                self._config_ts = 0

    def _update_datastore_file(self, lock: bool = True) -> None:
        with self._mutex:
            if lock:
                with FileLock(self._lock_file):
                    self._update_datastore_file(lock=False)
                return
            content = json.dumps(self._datastore.model_dump(exclude={"base_path"}), default=str)
            self._ignore_event_config = True
            write_atomic(Path(self._datastore_config_path), content.encode())
            self._config_ts = Path(self._datastore_config_path).stat().st_mtime  # type: ignore[assignment]

    def _reconcile_datastore(self) -> None:
        with self._mutex:
            super()._reconcile_datastore()

    def _on_moved(self, event: FileSystemEvent) -> None:
        if event.dest_path == self._datastore_config_path:
            self._init_from_datastore_file()
        else:
            self.refresh()

    def _to_id(self, file: str) -> tuple[str, str]:
        return stem(file), extension(file)

    # Images

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an image, or replace one of the same shape; its labels stay."""
        image_id = check_id("image", image_id or stem(image_filename))
        if not isinstance(image_info, dict):
            raise InputError("params", image_info, "send a JSON object")
        image = read_image(image_filename, argument="file")
        kind = extension(image_filename)
        with self._mutex:
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
            folder = Path(self._datastore.image_path())
            with FileLock(self._lock_file):
                copy_atomic(Path(image_filename), folder / f"{image_id}{kind}")
                if known is not None and known.image.ext != kind:
                    self._keep(folder / f"{image_id}{known.image.ext}", "images")
                info = {**image_info, "ts": int(time.time()), "name": f"{image_id}{kind}"}
                self._datastore.objects[image_id] = ImageLabelModel(
                    image=DataModel(info=info, ext=kind), labels=known.labels if known else {}
                )
                self._update_datastore_file(lock=False)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Take an image and its labels out of the index; the files go to the history."""
        with self._mutex:
            known = self._datastore.objects.get(image_id)
            if known is None:
                raise ImageNotFoundException(f"Image {image_id} not found")
            for tag in list(known.labels):
                self.remove_label(image_id, tag)
            self._keep(Path(self.get_image_uri(image_id)), "images")
            self._datastore.objects.pop(image_id, None)
            self._update_datastore_file()

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into an image's info."""
        if not isinstance(info, dict):
            raise InputError("info", info, "send a JSON object")
        with self._mutex:
            super().update_image_info(image_id, info)

    # Labels

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
        if not isinstance(label_info, dict):
            raise InputError("params", label_info, "send a JSON object")
        if image_id not in self._datastore.objects:
            raise ImageNotFoundException(f"Image {image_id} not found")
        content, kind = self._fit(image_id, Path(label_filename), label_info.get("label_info"))
        with self._mutex:
            known = self._datastore.objects.get(image_id)
            if known is None:
                raise ImageNotFoundException(f"Image {image_id} not found")
            folder = Path(self._datastore.label_path(label_tag))
            with FileLock(self._lock_file):
                folder.mkdir(parents=True, exist_ok=True)
                before = known.labels.get(label_tag)
                if before is not None:
                    self._keep(folder / f"{image_id}{before.ext}", label_tag, leave=before.ext == kind)
                if content is None:
                    copy_atomic(Path(label_filename), folder / f"{image_id}{kind}")
                else:
                    write_atomic(folder / f"{image_id}{kind}", content)
                info = {**label_info, "ts": int(time.time()), "name": f"{image_id}{kind}"}
                known.labels[label_tag] = DataModel(info=info, ext=kind)
                self._update_datastore_file(lock=False)
        return image_id

    def _fit(self, image_id: str, path: Path, label_info: object) -> tuple[bytes | None, str]:
        """Check a label file against its image; its content rewritten where its values are not the project's.

        Returns:
            New content, or None where the file can be taken as it is; and the extension to store it under.
        """
        values = read_labelmap(path, read_image(self.get_image_uri(image_id)))
        mapping = index_of_value(np.unique(values).tolist(), label_info, self._label_indices)
        kind = extension(path)
        if all(value == index for value, index in mapping.items()):
            return None, kind
        table = np.zeros(int(values.max()) + 1, np.uint8)
        for value, index in mapping.items():
            table[value] = index
        kind = ".nrrd" if kind in NRRD else kind if kind in NIFTI else ".png"
        return labelmap_bytes(table[values], read_image(path).affine, kind), kind

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label out of the index; its file goes to the history."""
        with self._mutex:
            uri = self.get_label_uri(label_id, label_tag)
            if not uri:
                return
            self._keep(Path(uri), label_tag)
            self._datastore.objects[label_id].labels.pop(label_tag, None)
            self._update_datastore_file()

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into a label's info."""
        if not isinstance(info, dict):
            raise InputError("info", info, "send a JSON object")
        with self._mutex:
            super().update_label_info(label_id, label_tag, info)

    def _keep(self, path: Path, kind: str, *, leave: bool = False) -> None:
        """Move a file that is being replaced or removed to the history; ``leave`` keeps it in place too."""
        if not path.is_file():
            return
        known = extension(path)
        target = Path(self._datastore_path, HOME, "history", kind, f"{stem(path)}.{time.time_ns()}{known}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if leave:
            try:
                os.link(path, target)
            except OSError:
                shutil.copy2(path, target)
        else:
            path.replace(target)
