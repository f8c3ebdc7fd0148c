"""The files that engines load."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from apps.samloop.checks.finding import Finding, Subject, existing, fail, gigabytes, ok, warn
from sam_infer.engines.catalog import CATALOG, FOLDERS, PACKAGED, Entry
from sam_infer.engines.integrity import check
from sam_infer.engines.location import cache_folder, find, find_folder
from sam_infer.errors import InputError

#: Larger files are not read through, which takes seconds a gigabyte.
_HASHED = 1 << 30
_SHA256 = re.compile(r"\| SHA-256 \| `([0-9a-f]{64})` \|")


def packaged(_: Subject) -> list[Finding]:
    """The shipped weights against their cards."""
    found = []
    for entry in (entry for entry in CATALOG.values() if entry.packaged):
        name, again = f"weights {entry.name}", "install samloop again"
        path, card = PACKAGED / entry.file, PACKAGED / Path(entry.page).name
        if not path.is_file():
            found.append(fail(name, f"{path} is not there", again))
            continue
        told = _SHA256.search(card.read_text("utf-8")) if card.is_file() else None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if told is None:
            found.append(warn(name, f"its card {card} names no SHA-256", again))
        elif told[1] != digest:
            found.append(
                fail(name, f"{path} has SHA-256 {digest[:12]}..., its card {told[1][:12]}...", again)
            )
        else:
            found.append(ok(name, f"comes with samloop; SHA-256 {digest[:12]}... as on its card"))
    return found


def engine(subject: Subject) -> list[Finding]:
    """The checkpoints of the engine, and of the SAM that is tuned, where they are not the shipped ones."""
    project = subject.project
    if project is None:
        return []
    found, used = [], {(project.engine, project.weights), (project.tuned, project.tuned_options["weights"])}
    for name, given in sorted(used, key=str):
        if CATALOG[name].packaged and given is None:
            continue
        found.append(_checkpoint(CATALOG[name], given))
    if "sam_auto_clip" in project.models:
        clip = FOLDERS["biomed_clip"]
        try:
            folder = project.clip or find_folder(clip)
            found.append(ok("weights clip", f"for sam_auto_clip: {folder}"))
        except InputError:
            text = "sam_auto_clip has no CLIP model; it says so when it is asked"
            found.append(ok("weights clip", f"{text} (`samloop weights fetch {clip.name}`)"))
    return found


def _checkpoint(entry: Entry, given: Path | None) -> Finding:
    name = f"weights {entry.name}"
    try:
        path = find(entry, given)
    except InputError as error:
        return fail(name, str(error), f"samloop weights fetch {entry.name}")
    size = path.stat().st_size
    if not os.access(path, os.R_OK):
        return fail(name, f"{path} cannot be read", "give this user the right to read it")
    if size > _HASHED:
        return ok(name, f"{path}, {gigabytes(size)}; `samloop weights verify {entry.name}` reads it through")
    verdict = check(entry, path)
    if verdict.good is False and path != given:
        return fail(name, f"{path} {verdict.text}", f"samloop weights fetch {entry.name}")
    if verdict.good:
        return ok(name, f"{path} {verdict.text}")
    return warn(name, f"{path}: {verdict.text}", "make sure that it is the file that you mean")


def caches(subject: Subject) -> list[Finding]:
    """What was fetched and what was encoded."""
    folder = cache_folder()
    if folder.exists() and not folder.is_dir():
        return [fail("weights folder", f"{folder} is a file", "name a folder in SAMLOOP_WEIGHTS")]
    found = [ok("weights folder", f"{folder}: {_content(folder)}")]
    parts = sorted(path.name for path in folder.glob("*.part")) if folder.is_dir() else []
    if parts:
        remedy = "go on with `samloop weights fetch`, or remove them"
        found.append(
            warn("weights folder", f"{len(parts)} downloads were cut off: {', '.join(parts)}", remedy)
        )
    if not os.access(existing(folder), os.W_OK):
        text = f"{folder} cannot be written by this user; nothing can be fetched into it"
        found.append(ok("weights folder", text))
    if subject.home is not None:
        found.append(ok("embeddings", _content(subject.home / "embeddings")))
    return found


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing yet"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes)} files, {gigabytes(sum(sizes))}"
