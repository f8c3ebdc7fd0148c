"""A stored file as a reply: open before the reply begins, resumable, not sent again to who has it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import anyio
from fastapi import Request
from fastapi.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from sam_infer.errors import InputError

#: How often a file is looked up that was replaced by one of another extension meanwhile.
_ATTEMPTS = 5


class HeldFile(FileResponse):
    """Sends an open file, whatever becomes of its name: whole, or the ranges that the request asks for.

    Args:
        file: The open file; it is closed at the end.
        name: What the client is to call it.
        media_type: Its content type.
        etag: Stands for its content.
    """

    chunk_size = 1 << 20

    def __init__(self, file: BinaryIO, *, name: str, media_type: str, etag: str) -> None:
        self._file = file
        stat = os.fstat(file.fileno())
        super().__init__(name, headers={"etag": etag}, media_type=media_type, filename=name, stat_result=stat)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        yield anyio.wrap_file(self._file)


def held(
    request: Request, argument: str, name: str, find: Callable[[], str], *, mime: Callable[[str], str]
) -> Response:
    """A stored file as it is now.

    ``ETag`` stands for its content, ``Range`` and ``If-Range`` resume a download, ``If-None-Match`` is
    answered with 304 where the client has it.

    Args:
        request: The request.
        argument: What the client called the file's id, for errors.
        name: The id.
        find: Gives the file's path; "" where there is none.
        mime: Gives the content type of a path.

    Raises:
        InputError: (404) When there is no such file.
    """
    for _ in range(_ATTEMPTS):
        path = find()
        try:
            file = Path(path).open("rb")  # noqa: SIM115 - closed by whoever sends it
        except IsADirectoryError:
            break
        except FileNotFoundError:
            continue  # replaced since it was looked up, by one of another extension
        stat = os.fstat(file.fileno())
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"'
        if _has(request.headers.get("if-none-match", ""), etag):
            file.close()
            return Response(status_code=304, headers={"etag": etag})
        return HeldFile(file, name=Path(path).name, media_type=mime(path), etag=etag)
    raise InputError(argument, name, "no such file in the datastore", status=404)


def _has(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag in (known.strip().removeprefix("W/") for known in header.split(","))
