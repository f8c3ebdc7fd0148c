"""Fetching checkpoint files, on request only: resumed where it was cut off, checked, and never half there.

What arrives is kept as NAME.part beside NAME.part.json, which says where it came from. Only a whole file that
passed its check is moved to NAME, so an engine never sees a part of one. A lock keeps two processes apart:
the second one waits and then finds the file.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
from filelock import FileLock

from sam_infer.engines.catalog import Download
from sam_infer.engines.integrity import check, record
from sam_infer.engines.location import by_hand, cache_folder
from sam_infer.errors import InputError
from sam_infer.files import sync, write_atomic

#: Tells how many bytes there are, and how many there will be (None = not known).
Report = Callable[[int, int | None], None]
#: Attempts in a row in which nothing arrives.
ATTEMPTS = 4
#: Seconds to wait for a connection, and for the next bytes.
TIMEOUT = (10, 60)
#: Bytes of the largest file that is fetched where its size is not known.
LARGEST = 8 << 30
_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class _RefusedError(Exception):
    """An address will not give the file."""


class _BrokenError(Exception):
    """The transfer broke off; it may go on."""


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where a part came from.

    Args:
        address: The address that was asked.
        validator: Its strong ETag, or its date of change; None = it tells neither.
        total: Bytes of the whole file, as it tells or else as the catalogue has it; None = not known.
    """

    address: str
    validator: str | None
    total: int | None

    def continues(self, before: _Origin) -> bool:
        """Whether a partial answer belongs to what came before; one without a validator is believed."""
        return self.total == before.total and self.validator in (None, before.validator)


def fetch(
    entry: Download,
    *,
    folder: Path | None = None,
    report: Report = lambda done, total: None,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch a checkpoint; at once where it is there and intact.

    Args:
        entry: The checkpoint.
        folder: Where the file goes; None = the cache folder.
        report: Called as bytes arrive.
        wait: Waits so many seconds between attempts.

    Returns:
        The file.

    Raises:
        InputError: When no address gives it, it is not the file that the catalogue knows, or it has no room.
    """
    if entry.packaged:
        raise InputError("weights", entry.name, "comes with the package; there is nothing to fetch")
    target = (folder or cache_folder()) / entry.file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file() or check(entry, target).good is False:
                _fetch(entry, target, report, wait)
    except OSError as error:
        raise InputError("weights", str(target), f"cannot be written: {error}") from error
    return target


def _fetch(entry: Download, target: Path, report: Report, wait: Callable[[float], None]) -> None:
    part = _Part(target)
    failures = []
    for address in entry.addresses:
        try:
            _transfer(part, address, entry, report, wait)
            break
        except _RefusedError as error:
            failures.append(f"{address}: {error}")
    else:
        raise InputError(
            "weights",
            entry.name,
            f"could not be fetched ({'; '.join(failures)}); {by_hand(entry, target)}",
        )
    verdict = check(entry, part.file)
    if verdict.good is False:
        part.discard()
        raise InputError(
            "weights", address, f"gave another file than the catalogue's, now deleted: it {verdict.text}"
        )
    sync(part.file)
    if entry.sha256 is None and verdict.sha256 is not None:
        record(target, verdict.sha256)
    part.file.replace(target)
    sync(target.parent)
    part.discard()


class _Part:
    """The bytes that have arrived, and where they came from."""

    def __init__(self, target: Path) -> None:
        self.file = target.with_name(target.name + ".part")
        self._origin = target.with_name(target.name + ".part.json")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.is_file() else 0

    @property
    def origin(self) -> _Origin | None:
        try:
            return _Origin(**json.loads(self._origin.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def start(self, origin: _Origin) -> None:
        self.file.write_bytes(b"")
        write_atomic(self._origin, json.dumps(asdict(origin)).encode())

    def discard(self) -> None:
        self.file.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)


def _transfer(
    part: _Part, address: str, entry: Download, report: Report, wait: Callable[[float], None]
) -> None:
    """Bring the part to its full size, in as many requests as it takes while each brings something."""
    origin = part.origin
    if origin is None or origin.address != address or (origin.validator is None and entry.sha256 is None):
        part.discard()
    idle, most = 0, part.size
    while True:
        try:
            return _request(part, address, entry, report)
        except (
            _BrokenError,
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            idle, most = (0, part.size) if part.size > most else (idle + 1, most)
            if idle == ATTEMPTS:
                raise _RefusedError(_reason(error)) from error
            wait(float(idle))
        except requests.RequestException as error:
            raise _RefusedError(_reason(error)) from error


def _request(part: _Part, address: str, entry: Download, report: Report) -> None:
    """Ask for what is missing and write it; `_BrokenError` where it should be asked again."""
    have, origin = part.size, part.origin
    if origin is not None and origin.total is not None and have == origin.total:
        return
    headers = {"Accept-Encoding": "identity", "User-Agent": "samloop"}
    if have and origin is not None:
        headers["Range"] = f"bytes={have}-"
        if origin.validator is not None:
            headers["If-Range"] = origin.validator
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        if reply.status_code in _PASSING:
            raise _BrokenError(f"HTTP {reply.status_code} {reply.reason}")
        if reply.status_code == 416:
            part.discard()
            raise _BrokenError("it holds less than has arrived")
        if reply.status_code not in (200, 206):
            raise _RefusedError(f"HTTP {reply.status_code} {reply.reason}")
        if reply.headers.get("Content-Type", "").startswith("text/html"):
            raise _RefusedError("it answers with a web page")
        given = _origin(reply, address, entry)
        told = given.total is not None or reply.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if not told and entry.sha256 is None:
            raise _RefusedError("it does not tell the file's size, and a part would look like the whole")
        if reply.status_code == 206:
            first = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
            if origin is None or not given.continues(origin) or first is None or int(first[1]) != have:
                part.discard()
                raise _BrokenError("the file has changed")
        else:
            have = 0
        limit = _room(part.file, have, given.total, entry)
        if not have:
            part.start(given)
        try:
            _write(part.file, reply, have, limit, report, given.total)
        except _RefusedError:
            part.discard()
            raise
    if not part.size:
        part.discard()
        raise _RefusedError("it gives an empty file")
    if given.total is not None and part.size < given.total:
        raise _BrokenError(f"broke off after {part.size} of {given.total} bytes")


def _origin(reply: requests.Response, address: str, entry: Download) -> _Origin:
    tag = reply.headers.get("ETag")
    strong = tag if tag and not tag.startswith("W/") else None
    if reply.status_code == 206:
        told = reply.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        told = reply.headers.get("Content-Length", "")
    return _Origin(
        address=address,
        validator=strong or reply.headers.get("Last-Modified"),
        total=int(told) if told.isdecimal() else entry.size,
    )


def _room(file: Path, have: int, total: int | None, entry: Download) -> int:
    """The size that the file may reach.

    Raises:
        _RefusedError: When the server offers a file of another size than the catalogue's.
        InputError: When the disk has no room for it.
    """
    if entry.size is not None and total not in (None, entry.size):
        raise _RefusedError(f"it offers {total} bytes instead of {entry.size}")
    limit = total or entry.size or LARGEST
    free = shutil.disk_usage(file.parent).free
    if total is not None and free < total - have:
        raise InputError("weights", str(file.parent), f"has {free} bytes free, {total - have} are needed")
    return limit


def _write(
    file: Path, reply: requests.Response, have: int, limit: int, report: Report, total: int | None
) -> None:
    with file.open("ab") as writer:
        report(have, total)
        for chunk in reply.iter_content(_CHUNK):
            have += len(chunk)
            if have > limit:
                raise _RefusedError(f"it gives more than {limit} bytes")
            writer.write(chunk)
            report(have, total)


def _reason(error: Exception) -> str:
    """The innermost cause in one line, without addresses of objects."""
    while error.__cause__ or error.__context__:
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, Exception):
            break
        error = inner
    return re.sub(r"<[^>]*>:? ?", "", str(error)).strip()[:200] or type(error).__name__
