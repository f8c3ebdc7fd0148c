"""What the folders of a store hold beside what its index says, as lines for the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apps.samloop.history import Recalled
from apps.samloop.index import Entry, Objects
from apps.samloop.journal import Line, line, said_by
from apps.samloop.studyfiles import Seen

Listed = Mapping[str, list[Seen]]


@dataclass(kw_only=True)
class Differences:
    """What is to be done so that the index says what the folders hold.

    Args:
        lines: For the journal.
        touched: Labels whose files have the known content and another time: (image, tag, file).
        second: Label files beside the one that counts: (image, tag, file).
    """

    lines: list[Line] = field(default_factory=list)
    touched: list[tuple[str, str, Seen]] = field(default_factory=list)
    second: list[tuple[str, str, Seen]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.lines or self.touched or self.second)


def differences(
    objects: Objects,
    images: Listed,
    labels: Mapping[str, Listed],
    *,
    hashed: Callable[[str, str, Seen], str | None],
    recall: Callable[[], Recalled],
) -> Differences:
    """Compare the index with the folders.

    A label file that is not as the store left it is looked up in the journal by its content: one that was
    put back, or belongs to an index that was lost, has its info again.

    Args:
        objects: The index's.
        images: Image files by id, the newest first.
        labels: The same for the labels of each tag.
        hashed: (id, tag, file) -> hash of a label file; None where it is gone by now.
        recall: What the journal says; called where it is needed only.
    """
    found = Differences()
    found.lines += [line("lost", name) for name in objects if name not in images]
    for name, files in images.items():
        known = objects.get(name)
        if known is None or known.image.ext not in {seen.ext for seen in files}:
            info = _as_seen(name, files[0], recall()[0].get(name, {}))
            found.lines.append(line("found", name, ext=files[0].ext, info=info))
    for name, case in objects.items():
        gone = [tag for tag in case.labels if name not in labels.get(tag, {})] if name in images else []
        found.lines += [line("lost", name, tag) for tag in gone]
    for tag, listed in labels.items():
        for name, files in listed.items():
            if name in images:
                known = objects.get(name)
                _compare(name, tag, files, known.labels.get(tag) if known else None, found, hashed, recall)
    return found


def _compare(
    name: str,
    tag: str,
    files: list[Seen],
    known: Entry | None,
    found: Differences,
    hashed: Callable[[str, str, Seen], str | None],
    recall: Callable[[], Recalled],
) -> None:
    seen = next((seen for seen in files if known and seen.ext == known.ext), files[0])
    found.second += [(name, tag, other) for other in files if other is not seen]
    same = known is not None and known.ext == seen.ext
    if same and known and (known.size, known.mtime_ns) == (seen.size, seen.mtime_ns):
        return
    sha256 = hashed(name, tag, seen)
    if sha256 is None:
        return
    if same and known and known.sha256 == sha256:
        found.touched.append((name, tag, seen))
        return
    info = recall()[1].get((name, tag, sha256), {})
    if same and known and known.sha256 is None:  # of an index that another program wrote
        info = {**info, **known.info}
    info = _as_seen(name, seen, info)
    facts = {"sha256": sha256, "size": seen.size, "ext": seen.ext, "mtime_ns": seen.mtime_ns}
    found.lines.append(line("found", name, tag, **said_by(info), **facts, info=info))


def _as_seen(name: str, seen: Seen, info: Mapping[str, Any]) -> dict[str, Any]:
    return {"ts": int(time.time()), **info, "name": f"{name}{seen.ext}"}
