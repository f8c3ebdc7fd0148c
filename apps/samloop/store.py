"""The local datastore: checked names and files, atomic writes, recovery, nothing accepted ever lost."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from monailabel.interfaces.exception import ImageNotFoundException

from apps.samloop.history import IMAGES, lines_about, versions
from apps.samloop.incoming import check_id, check_tag, same_file
from apps.samloop.index import Entry, Objects, case_of, label_of
from apps.samloop.indexed import IndexedDatastore
from apps.samloop.journal import HOME as HOME
from apps.samloop.journal import Line, encoded, line, made_by, said_by
from apps.samloop.labelinfo import index_of_value, stored_info
from sam_infer.errors import InputError, StorageError
from sam_infer.files import place, sha256_of, staged, sync, synced_writer
from sam_infer.volumes import (
    NIFTI,
    NRRD,
    Image,
    extension,
    file_key,
    fit_labelmap,
    labelmap_bytes,
    read_image,
    stem,
)

#: A full disk or quota, a disk that became read-only or fails, files of another user.
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
#: Of a version's info: who saved it, and the names of its file's values before they became the project's.
_NOT_RESTORED = {"user", "client_id", "restored", "label_info"}


class SafeDatastore(IndexedDatastore):
    """MONAI Label's local datastore, made safe.

    - Every file is written to a temporary name, synced, and moved into place; every change is a synced line
      of the journal (`apps.samloop.journal`) before it is answered.
    - A damaged index is set aside and rebuilt from the journal and the files instead of refusing to start.
    - A label or image that is replaced or removed goes to ``.samloop/history``, and not before what replaces
      it is on the disk. Every version of a label can be listed, downloaded and put back.
    - Labels must be readable, of the image's shape, with values among the project's labels.

    Args:
        folder: The studies folder.
        labels: Label name -> index of the project.
        auto_reload: Watch the folder for files that come and go.
        read_only: Do not reconcile the index with the files.
        read: Path to image; one that caches spares reading a volume that was just looked at.

    Raises:
        InputError: When the folder cannot be written, or its labels would be written elsewhere.
    """

    def __init__(
        self,
        folder: str,
        *,
        labels: dict[str, int],
        auto_reload: bool = True,
        read_only: bool = False,
        read: Callable[[Path], Image] = read_image,
    ) -> None:
        self._label_indices = labels
        self._read = read
        super().__init__(folder, auto_reload=auto_reload, read_only=read_only)

    # Images

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add an image, or replace one of the same shape; its labels stay, its file goes to the history.

        Raises:
            InputError: When it cannot be read, or the id is, or could be taken for, another image's.
        """
        image_id = check_id("image", image_id or stem(image_filename))
        with _storing(f"image {image_id}"):
            self._add(image_id, image_filename, image_info)
        return image_id

    def _add(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> None:
        shape = read_image(image_filename, argument="file").shape
        kind = extension(image_filename)
        target = self.check_inside(self._images) / f"{image_id}{kind}"
        with staged(target) as temporary:
            written = _stage(temporary, Path(image_filename))
            checked = self._check_shape(image_id, shape, checked=None)
            with self._locked() as objects:
                self._check_shape(image_id, shape, checked=checked)
                _check_name(image_id, objects)
                known = objects.get(image_id)
                before = self._images / f"{image_id}{known.image.ext}" if known else target
                mark = str(time.time_ns())
                kept = {p: self._history.keep(p, IMAGES, mark) for p in {before, target} if p.is_file()}
                facts = {**said_by(image_info), **written, "replaced": kept.get(before)}
                info = _noted(image_info, target)
                told = encoded([line("saved", image_id, ext=kind, **facts, info=info)])
                self._swap(temporary, target, told, kept)
                if before != target:
                    _remove(before)

    def _check_shape(self, image_id: str, shape: tuple[int, ...], *, checked: tuple | None) -> tuple | None:
        """Refuse an image of another shape than the one whose labels it would get.

        Args:
            image_id: The image.
            shape: The new one's.
            checked: The file that was compared already, as this returned it.

        Returns:
            What the file of now is; None where there is none with labels.
        """
        known = self._objects.get(image_id)
        path = Path(self.get_image_uri(image_id))
        if known is None or not known.labels or not path.is_file():
            return None
        key = file_key(path)
        if key != checked and (before := self._read(path).shape) != shape:
            raise InputError(
                "image",
                image_id,
                f"has labels of shape {before} and the new image has {shape}; choose another id",
                status=409,
            )
        return key

    def remove_image(self, image_id: str) -> None:
        """Take an image and its labels out of the index; the files go to the history.

        Raises:
            ImageNotFoundException: When there is no such image.
        """
        with _storing(f"the removal of image {image_id}"), self._locked() as objects:
            case = case_of(objects, image_id)
            path = self._images / f"{image_id}{case.image.ext}"
            gone = [self._label_file(image_id, tag, entry) for tag, entry in case.labels.items()]
            lines = [self._removed(image_id, tag, entry) for tag, entry in case.labels.items()]
            kept = self._history.keep(path, IMAGES, str(time.time_ns())) if path.is_file() else None
            lines.append(line("removed", image_id, **said_by({}), kept=kept))
            self._record(encoded(lines))
            for file in (*gone, path):
                _remove(file)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into an image's info."""
        with _storing(f"the info of image {image_id}"), self._locked() as objects:
            case_of(objects, image_id)
            self._record(encoded([line("info", image_id, **said_by(info), info=info)]))

    # Labels

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]
    ) -> str:
        """Save a label; the one that it replaces goes to the history.

        ``label_info["label_info"]`` names the file's values; they are stored as the project's indices.

        Raises:
            ImageNotFoundException: When there is no such image.
            InputError: When the file is not a label map of the image, or holds unknown values; (409) when the
                image is replaced meanwhile.
        """
        with _storing(f"label {label_tag} of {image_id}"):
            self._save(image_id, Path(label_filename), label_tag, label_info)
        return image_id

    def _save(self, image_id: str, path: Path, tag: str, info: dict[str, Any]) -> None:
        check_tag(tag)
        case_of(self._objects, image_id)
        key = self._image_key(image_id)
        content, kind = self._fit(image_id, path, info.get("label_info"))
        info = {**info, **stored_info(info.get("label_info"), self._label_indices)}
        target = self.check_inside(self._labels / tag) / f"{image_id}{kind}"
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            sync(self._labels)
        with staged(target) as temporary:
            written = _stage(temporary, path if content is None else content)
            with self._locked() as objects:
                case = case_of(objects, image_id)
                if self._image_key(image_id) != key:
                    remedy = "the image was replaced while its label was being saved; load it again"
                    raise InputError("image", image_id, remedy, status=409)
                known = case.labels.get(tag)
                before = self._label_file(image_id, tag, known) if known else target
                kept = {p: self._keep(p, tag, known) for p in {before, target} if p.is_file()}
                proposal = case.labels.get("original") if tag != "original" else None
                facts = {
                    **said_by(info),
                    "model": info.get("model"),
                    "proposed": made_by(proposal.info if proposal else info) or None,
                    **written,
                    "image_sha256": case.image.sha256,
                    "replaced": kept.get(before),
                    "restored": info.get("restored"),
                }
                told = line("saved", image_id, tag, ext=kind, **facts, info=_noted(info, target))
                self._swap(temporary, target, encoded([told]), kept)
                if before != target:
                    _remove(before)

    def _image_key(self, image_id: str) -> tuple:
        try:
            return file_key(Path(self.get_image_uri(image_id)))
        except OSError:
            raise ImageNotFoundException(f"The file of image {image_id} is gone") from None

    def _fit(self, image_id: str, path: Path, label_info: object) -> tuple[bytes | None, str]:
        """Check a label file against its image; rewritten where it does not lie on it or has other values.

        Returns:
            New content, or None where the file can be taken as it is; and the extension to store it under.
        """
        image = self._read(Path(self.get_image_uri(image_id)))
        values, fits = fit_labelmap(path, image)
        present = np.unique(values.ravel(order="K"))
        mapping = index_of_value(present.tolist(), label_info, self._label_indices)
        kind = extension(path)
        if fits and all(value == index for value, index in mapping.items()):
            return None, kind
        indices = np.array([mapping.get(int(value), 0) for value in present], np.uint8)
        kind = ".nrrd" if kind in NRRD else kind if kind in NIFTI else ".png"
        return labelmap_bytes(indices[np.searchsorted(present, values)], image.affine, kind), kind

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label out of the index; its file goes to the history.

        Raises:
            LabelNotFoundException: When there is no such label.
        """
        what = f"the removal of label {label_tag} of {label_id}"
        with _storing(what), self._locked() as objects:
            entry = label_of(objects, label_id, label_tag)
            self._record(encoded([self._removed(label_id, label_tag, entry)]))
            _remove(self._label_file(label_id, label_tag, entry))

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Merge ``info`` into a label's info."""
        what = f"the info of label {label_tag} of {label_id}"
        with _storing(what), self._locked() as objects:
            label_of(objects, label_id, label_tag)
            self._record(encoded([line("info", label_id, label_tag, **said_by(info), info=info)]))

    # Versions

    def label_history(self, image_id: str, tag: str | None = None) -> list[dict[str, Any]]:
        """What became of the labels of an image, oldest first; see `apps.samloop.history.versions`.

        Raises:
            ImageNotFoundException: When there is no such image, and never was.
        """
        case = self._objects.get(image_id)
        lines = lines_about(self._journal, image_id, tag)
        if case is None and not lines:
            raise ImageNotFoundException(f"Image {image_id} not found")
        current = {name: entry.sha256 for name, entry in case.labels.items()} if case else {}
        return versions(lines, self._history, current)

    def label_version(self, image_id: str, tag: str, sha256: str) -> Path:
        """The file of a version of a label, whose content was checked.

        Raises:
            InputError: (404) When there is no such version, (410) when its file is gone or damaged.
        """
        case = self._objects.get(image_id)
        entry = case.labels.get(tag) if case else None
        files = [self._label_file(image_id, tag, entry)] if entry and entry.sha256 == sha256 else []
        lines = [told for told in lines_about(self._journal, image_id, tag) if told.get("sha256") == sha256]
        if not lines and not files:
            remedy = f"no version of label {tag} of {image_id}; GET /datastore/label/history lists them"
            raise InputError("sha256", sha256, remedy, status=404)
        files += [self._history.file_of(told) for told in lines if "ext" in told or "file" in told]
        for file in files:
            if sha256_of(file) == sha256:
                return file
        raise InputError("sha256", sha256, "the file of this version is gone or damaged", status=410)

    def restore_label(self, image_id: str, tag: str, sha256: str, info: dict[str, Any]) -> str:
        """Save an earlier version of a label again, as the newest; nothing of what was saved since is lost.

        Args:
            image_id: The image.
            tag: The label's tag.
            sha256: The version.
            info: Who does it: ``user``, ``client_id``.

        Raises:
            ImageNotFoundException: When there is no such image.
            InputError: As of `label_version`; (422) when it does not fit the image of now.
        """
        case_of(self._objects, image_id)
        file = self.label_version(image_id, tag, sha256)
        lines = [told for told in lines_about(self._journal, image_id, tag) if told.get("sha256") == sha256]
        said: dict[str, Any] = next((told["info"] for told in reversed(lines) if "info" in told), {})
        kept = {key: value for key, value in said.items() if key not in _NOT_RESTORED}
        return self.save_label(image_id, str(file), tag, {**kept, **info, "restored": sha256})

    # Files

    def _label_file(self, image_id: str, tag: str, entry: Entry) -> Path:
        return self._labels / tag / f"{image_id}{entry.ext}"

    def _keep(self, path: Path, tag: str, known: Entry | None) -> str:
        """Put a label that is about to be replaced or removed into the history too; its name there."""
        stat = path.stat()
        same = known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        sha256 = known.sha256 if same and known else None
        return self._history.keep(path, tag, sha256 or str(sha256_of(path)))

    def _removed(self, image_id: str, tag: str, entry: Entry) -> Line:
        path = self._label_file(image_id, tag, entry)
        kept = self._keep(path, tag, entry) if path.is_file() else None
        return line("removed", image_id, tag, **said_by({}), sha256=entry.sha256, kept=kept)

    def _swap(self, temporary: Path, target: Path, told: bytes, kept: dict[Path, str]) -> None:
        """Put a file into its place and into the journal, or neither; the lock is held."""
        place(temporary, target)
        try:
            self._record(told)
        except BaseException:
            if target in kept:
                self._history.put_back(kept[target], target)
            else:
                target.unlink()
            raise


def _check_name(image_id: str, objects: Objects) -> None:
    """Refuse a new id whose file a file system without capitals, or with one accents' form, has already."""
    if image_id in objects:
        return
    same = same_file(image_id)
    for other in objects:
        if same_file(other) == same:
            remedy = f"differs from the image {other!r} in capitals or accents' form only; choose another id"
            raise InputError("image", image_id, remedy, status=409)


def _stage(temporary: Path, source: bytes | Path) -> dict[str, Any]:
    """Write a file to the disk; returns sha256, size in bytes and mtime_ns, which stay when it is moved."""
    digest = hashlib.sha256()
    with _opened(source) as reader, synced_writer(temporary) as writer:
        while piece := reader.read(1 << 20):
            digest.update(piece)
            writer.write(piece)
    stat = temporary.stat()
    return {"sha256": digest.hexdigest(), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


@contextmanager
def _opened(source: bytes | Path) -> Iterator[BinaryIO]:
    if isinstance(source, bytes):
        yield BytesIO(source)
    else:
        with source.open("rb") as reader:
            yield reader


def _noted(info: dict[str, Any], path: Path) -> dict[str, Any]:
    return {**info, "ts": int(time.time()), "name": path.name}


@contextmanager
def _storing(what: str) -> Iterator[None]:
    """Tell why something cannot be written, where whoever looks after the server can mend it."""
    try:
        yield
    except OSError as error:
        if error.errno in _MENDABLE:
            raise StorageError(what, error) from error
        raise


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync(path.parent)
