"""Sessions: images that are kept for a while, and how many bytes of them."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

from fastapi import HTTPException
from monailabel.utils.sessions import Sessions

from sam_infer.errors import InputError

#: Seconds for which a session may be asked to last; the server's own setting is an hour.
MAX_EXPIRY = 24 * 3600
#: Bytes of all sessions together: four of the largest uploads.
MAX_BYTES = 8 << 30
#: Seconds after which a session folder without a readable record is what a killed server left.
_UNFINISHED = 3600.0


def check_expiry(expiry: int) -> int:
    """Seconds for which a session is to last after it was last used, at most a day; 0 = the server's own.

    Raises:
        InputError: When it is negative.
    """
    if expiry < 0:
        raise InputError("expiry", expiry, "send seconds; 0 = as long as the server lets a session last")
    return min(expiry, MAX_EXPIRY)


def check_room(sessions: Sessions, coming: int) -> None:
    """Make room for a session by removing those that have expired.

    Args:
        sessions: All of them.
        coming: Bytes of the new one.

    Raises:
        HTTPException: (507) When there is none left.
    """
    if _size(sessions) + coming > MAX_BYTES:
        remove_expired(sessions)
        if _size(sessions) + coming > MAX_BYTES:
            raise HTTPException(507, "the sessions are full; delete yours, or wait until others expire")


def remove_expired(sessions: Sessions) -> None:
    """Remove the sessions that have expired, and what killed servers left of some.

    Stock's own fails for good, and keeps the server from starting, where a folder has no record.
    """
    store = Path(sessions.store_path)
    now = time.time()
    for folder in store.iterdir() if store.is_dir() else ():
        with suppress(FileNotFoundError):
            try:
                record = json.loads((folder / "meta.info").read_text("utf-8"))
                ends = float(record["last_access_ts"]) + float(record["expiry"])
            except (OSError, ValueError, KeyError, TypeError):
                ends = folder.stat().st_mtime + _UNFINISHED
            if folder.is_dir() and ends < now:
                sessions.pop(folder.name, None)
                shutil.rmtree(folder, ignore_errors=True)


def _size(sessions: Sessions) -> int:
    total = 0
    for path in Path(sessions.store_path).rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
