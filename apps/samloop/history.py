"""Files that were replaced or removed, and which version of a label is where.

A label's file is named by its content, ``TAG/ID.SHA256.nii.gz`` with 32 digits: a line of the journal tells
where its version lies. An image's is named by the time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apps.samloop.incoming import is_tag
from apps.samloop.journal import Journal, Line
from sam_infer.files import copy_atomic, sha256_of, sync
from sam_infer.volumes import extension, stem

Info = dict[str, Any]
#: Infos of images, and of labels by (image, tag, sha256).
Recalled = tuple[dict[str, Info], dict[tuple[str, str, str], Info]]
#: Digits of a hash in a file's name.
DIGITS = 32
IMAGES = "images"
#: A time in ns, which was the mark of labels too before there was a journal, or a hash.
_MARK = re.compile(r"[0-9]{19}|[0-9a-f]{32}")
#: What a version tells; ``info``, which can be long, only of notes.
_TOLD = ("time", "event", "tag", "who", "client", "model", "proposed", "restored", "sha256", "size")


class History:
    """The folder of replaced and removed files.

    Args:
        folder: It; made on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, path: Path, kind: str, mark: str) -> str:
        """Put a file that is about to be replaced or removed here too; it is on the disk at the end.

        Args:
            path: The file.
            kind: ``images``, or a tag.
            mark: Its content's hash, or the time.

        Returns:
            Its name, relative to the folder.
        """
        name = f"{kind}/{stem(path)}.{mark[:DIGITS]}{extension(path)}"
        target = self.folder / name
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
            for place in (self.folder, self.folder.parent, self.folder.parent.parent):
                sync(place)
        if target.exists() and sha256_of(target) == sha256_of(path):
            return name
        target.unlink(missing_ok=True)
        try:
            if path.is_symlink():
                raise OSError("a link to a link would be kept, not the file")
            os.link(path, target)
        except OSError:  # no hard links on this file system
            copy_atomic(path, target)
        sync(target.parent)
        return name

    def put_back(self, name: str, target: Path) -> None:
        """Undo `keep`: the file is again what ``target`` holds, also on a full disk."""
        try:
            (self.folder / name).replace(target)
        except OSError:  # another disk
            copy_atomic(self.folder / name, target)
        sync(target.parent)

    def file_of(self, line: Line) -> Path:
        """Where the version of a label that a line of the journal tells of lies once it is replaced."""
        if "file" in line:
            return self.folder / line["file"]
        ext = str(line.get("ext", "")).lower()
        return self.folder / line["tag"] / f"{line['image']}.{line['sha256'][:DIGITS]}{ext}"

    def unrecorded(self, journal: Journal) -> list[Line]:
        """A line for each label here that a journal, new or begun anew, does not know, oldest first."""
        known = {(line["image"], line.get("tag"), line.get("sha256")) for line, _ in journal.read()}
        lines = (line for line in self._kept() if (line["image"], line["tag"], line["sha256"]) not in known)
        return sorted(lines, key=lambda line: line["time"])

    def _kept(self) -> Iterator[Line]:
        for file in self.folder.glob("*/*"):
            tag, (image, _, mark) = file.parent.name, stem(file).rpartition(".")
            if tag == IMAGES or not (is_tag(tag) and extension(file) and image and _MARK.fullmatch(mark)):
                continue
            ns = int(mark) if len(mark) < DIGITS else file.stat().st_mtime_ns
            yield {
                "time": datetime.fromtimestamp(ns / 1e9, UTC).isoformat(),
                "event": "earlier",
                "image": image,
                "tag": tag,
                "sha256": sha256_of(file),
                "size": file.stat().st_size,
                "file": f"{tag}/{file.name}",
            }


def lines_about(journal: Journal, image_id: str, tag: str | None) -> list[Line]:
    """The journal's lines about the labels of an image, under one tag or all, oldest first."""
    return [
        line
        for line, _ in journal.read(holding=image_id)
        if line["image"] == image_id and "tag" in line and tag in (None, line["tag"])
    ]


def versions(lines: list[Line], history: History, current: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """What became of the labels of an image, as a client is told.

    Args:
        lines: As of `lines_about`.
        history: Where replaced files are.
        current: The hashes of the labels in force by tag.

    Returns:
        For each line ``time``, ``event``, ``tag``, who did it, what it followed from; where it brought a
        version ``sha256``, ``current``, and ``available``: whether its file is there.
    """
    found = []
    for line in lines:
        told = {key: line[key] for key in _TOLD if key in line}
        if line["event"] == "info":
            told["info"] = line["info"]
        elif "ext" in line or "file" in line:
            told["current"] = current.get(line["tag"]) == line["sha256"]
            told["available"] = told["current"] or history.file_of(line).is_file()
        found.append(told)
    return found


def recalled(journal: Journal) -> Recalled:
    """What the journal knows of files that the index does not: infos of images, and of labels by content.

    Returns:
        Image -> info of those that were not removed; (image, tag, sha256) -> info.
    """
    images: dict[str, Info] = {}
    labels: dict[tuple[str, str, str], Info] = {}
    last: dict[tuple[str, str], tuple[str, str, str]] = {}
    for line, _ in journal.read():
        image, tag, event = line["image"], line.get("tag"), line["event"]
        info = line.get("info")
        if tag is None and event == "removed":
            images.pop(image, None)
        if not isinstance(info, dict):
            continue
        if tag is None:
            images[image] = {**images.get(image, {}), **info} if event == "info" else info
        elif event == "info":
            key = last.get((image, tag))
            if key is not None:
                labels[key] = {**labels[key], **info}
        elif isinstance(line.get("sha256"), str):
            key = last[image, tag] = (image, tag, line["sha256"])
            labels[key] = info
    return images, labels
