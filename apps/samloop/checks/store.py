"""The folder of images and labels, as it lies there; the server that uses it may be running."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apps.samloop.checks.finding import Finding, Subject, fail, few, ok, room, warn
from apps.samloop.journal import NAME, Journal, Line
from apps.samloop.studyfiles import Seen, StudyFiles
from sam_infer.errors import InputError
from sam_infer.files import sha256_of
from sam_infer.volumes import read_image

#: Seconds for reading images, and labels, through; and the largest file that is.
_SECONDS, _LARGEST = 2.0, 64 << 20
#: Seconds by which a file's time may be ahead of the clock, and after which a temporary file was left behind.
_AHEAD, _LEFT = 60, 3600
Listed = Mapping[str, list[Seen]]
#: (image, tag; "" = the image itself) -> what is recorded of its file.
State = dict[tuple[str, str], Mapping[str, Any]]


def store(subject: Subject) -> list[Finding]:
    """Whether it can be used, and whether index, journal and files agree."""
    folder = subject.folder
    if folder is None:
        return []
    if not folder.is_dir():
        if subject.remote:
            return [ok("store", f"{folder} is made when the server is started"), room("disk", folder, "it")]
        return [fail("store", f"there is no folder {folder}", "create it and put images into it")]
    found = [*_rights(folder), room("disk", folder, "images and labels")]
    if not os.access(folder, os.R_OK | os.X_OK):
        return found
    with _heard("apps.samloop.studyfiles") as unserved:
        files = StudyFiles(folder.resolve())
        images = files.images(folder)
        tags = sorted(path.name for path in folder.glob("labels/[!.]*") if path.is_dir())
        labels = {tag: files.labels(folder / "labels" / tag) for tag in tags}
    found += _files(folder, images, labels, fetched=subject.remote)
    found += [warn("store", text, "rename or remove it") for text in unserved[:5]]
    state, journal = _recorded(folder)
    return [*found, *journal, *_agree(folder, state, images, labels), *_readable(folder, images)]


def _rights(folder: Path) -> list[Finding]:
    """Who owns it, and whether this user may write what the server writes."""
    owner, own = folder.stat().st_uid, os.getuid()
    text = f"{folder}, of uid {owner}, seen by uid {own}"
    remedy = f"chown -R {own} {folder}, or run the server as uid {owner}"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return [fail("store", f"{text}: mounted read-only", "mount it writable: labels are saved in it")]
    places = [folder, *folder.glob("labels"), *folder.glob("labels/*/"), *folder.glob(".samloop")]
    places += [*folder.glob("datastore_v2.json"), *folder.glob(f".samloop/{NAME}")]
    closed = [str(path) for path in places if not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        return [fail("store", f"{text}: no right to read and write {few(closed)}", remedy)]
    others = [path.name for path in places if path.stat().st_uid != own]
    if others and own != 0:
        return [warn("store", f"{text}: {few(others)} are somebody else's", remedy)]
    return [ok("store", text)]


def _files(folder: Path, images: Listed, labels: Mapping[str, Listed], *, fetched: bool) -> list[Finding]:
    """What lies there; images that are fetched when they are asked for may be missing."""
    found = []
    counts = ", ".join(f"{len(files)} of tag {tag}" for tag, files in labels.items() if files)
    text = f"{len(images)} images, labels: {counts or 'none yet'}"
    empty = warn("images", text, "put images there, or upload some")
    found.append(ok("images", text) if images or fetched else empty)
    alike = defaultdict(list)
    for name in images:
        alike[name.casefold()].append(name)
    for names in [names for names in alike.values() if len(names) > 1][:5]:
        remedy = "rename all but one: a folder served by Windows or macOS holds one of them only"
        found.append(warn("images", f"ids that differ in capitals only: {', '.join(names)}", remedy))
    stray = [f"{tag}/{name}" for tag, files in labels.items() for name in files if name not in images]
    if stray:
        text = f"{len(stray)} labels have no image: {few(stray)}"
        found.append(warn("labels", text, "put the image back, or take the label away"))
    now = time.time()
    hidden = [path for place in (folder, *folder.glob("labels/*/")) for path in place.glob(".*.tmp")]
    left = [path.name for path in hidden if path.stat().st_mtime < now - _LEFT]
    if left:
        found.append(
            ok("store", f"{len(left)} temporary files of killed writers; the next start removes them")
        )
    ahead = [
        f"{name}{seen.ext}"
        for name, files in images.items()
        for seen in files
        if seen.mtime_ns > (now + _AHEAD) * 1e9
    ]
    if ahead:
        text = f"{len(ahead)} images are from the future: {few(ahead)}"
        found.append(warn("clock", text, "set the clocks of this computer and of those that write there"))
    return found


def _recorded(folder: Path) -> tuple[State, list[Finding]]:
    """What index and journal say, without changing either."""
    path, journal = folder / "datastore_v2.json", Journal(folder / ".samloop" / NAME)
    found, state, at = [], {}, 0
    if path.is_file():
        try:
            index = json.loads(path.read_bytes())
            state = dict(_of_index(index))
            at = journal.size() if index.get("journal") is None else int(index["journal"])
            found.append(ok("index", f"{path.name} is readable"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = f"{path.name} is damaged ({error})"
            found.append(warn("index", text, "nothing: the next start keeps it and makes it anew"))
    else:
        found.append(ok("index", "there is none yet; the next start makes it"))
    aside = [path.name for path in folder.glob(".samloop/*.damaged.json")]
    if aside:
        text = f"{len(aside)} damaged indexes were set aside in .samloop: {few(aside)}"
        found.append(warn("index", text, "find out what damaged them, then remove them"))
    if journal.size() == 0:
        return state, found
    if at > journal.size() or not journal.is_end(at):
        text = f"{NAME} does not hold the place {at} that the index names"
        found.append(
            warn("journal", text, "put back the journal that belongs to it; the files count until then")
        )
        at = journal.size()
    with _heard("apps.samloop.journal") as damaged:
        for line, end in journal.read():
            if end > at:
                _apply(state, line)
    found += [
        warn("journal", text, "keep a copy: it is the record of who accepted what") for text in damaged[:5]
    ]
    if not journal.is_end(journal.size()):
        found.append(ok("journal", "its last line is unfinished; it was never answered and is cut off"))
    if not damaged:
        found.append(ok("journal", f"{journal.path} is readable, {journal.size()} bytes"))
    return state, found


def _of_index(index: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    for name, case in index["objects"].items():
        yield (name, ""), {"ext": case["image"]["ext"]}
        for tag, entry in case["labels"].items():
            yield (name, tag), {key: entry.get(key) for key in ("ext", "size", "sha256")}


def _apply(state: State, line: Line) -> None:
    name, tag, event = line["image"], line.get("tag") or "", line["event"]
    if event in ("saved", "found"):
        state[name, tag] = {key: line.get(key) for key in ("ext", "size", "sha256")}
    elif event in ("removed", "lost"):
        for key in [key for key in state if key == (name, tag) or (key[0] == name and not tag)]:
            del state[key]


def _agree(folder: Path, state: State, images: Listed, labels: Mapping[str, Listed]) -> list[Finding]:
    """Whether the files are what is recorded of them."""
    found: list[Finding] = []
    counts: Counter[str] = Counter()
    changed: list[str] = []
    lost: list[str] = []
    deadline = time.monotonic() + _SECONDS
    for (name, tag), recorded in state.items():
        listed = (labels.get(tag, {}) if tag else images).get(name, [])
        seen = next((seen for seen in listed if seen.ext == recorded["ext"]), None)
        shown = f"{tag}/{name}" if tag else name
        if seen is None:
            lost.append(f"{shown}{recorded['ext']}")
            continue
        size, sha256 = recorded.get("size"), recorded.get("sha256")
        if size is not None and size != seen.size:
            changed.append(shown)
        elif sha256 is not None and seen.size <= _LARGEST and time.monotonic() < deadline:
            counts["hashed"] += 1
            if sha256_of(folder / "labels" / tag / f"{name}{seen.ext}") != sha256:
                changed.append(shown)
    new = [name for name in images if (name, "") not in state]
    if lost:
        text = f"{len(lost)} files that are recorded are not there: {few(lost)}"
        found.append(warn("store", text, "put them back; the next start takes them out of the index"))
    if changed:
        text = f"{len(changed)} labels are not as they were saved: {few(changed)}"
        remedy = "find out who changed them; what was saved is in .samloop/history if it was replaced here"
        found.append(warn("labels", text, remedy))
    if state and not lost and not changed:
        text = f"files are as recorded; {counts['hashed']} labels compared by their SHA-256"
        found.append(ok("store", text))
    if state and new:
        found.append(ok("images", f"{len(new)} new images are taken in by the next start: {few(new)}"))
    return found


def _readable(folder: Path, images: Listed) -> list[Finding]:
    """Read images through, as long as there is time, the newest first."""
    deadline, count = time.monotonic() + _SECONDS, 0
    damaged: list[Finding] = []
    newest = sorted(images.items(), key=lambda pair: -pair[1][0].mtime_ns)
    for name, files in newest:
        seen = files[0]
        if seen.size > _LARGEST:
            continue
        if time.monotonic() > deadline or len(damaged) >= 5:
            break
        count += 1
        try:
            read_image(folder / f"{name}{seen.ext}")
        except InputError as error:
            damaged.append(warn("images", str(error).partition("; send")[0], "replace the file"))
    if images and not damaged:
        damaged.append(ok("images", f"{count} of {len(images)} were read through, none is damaged"))
    return damaged


@contextmanager
def _heard(name: str) -> Iterator[list[str]]:
    """What a logger says meanwhile, instead of the log."""
    logger, told = logging.getLogger(name), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
