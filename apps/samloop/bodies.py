"""How much may be sent, by how many at once, and how slowly."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.samloop.guard import RETRY

#: Bytes of a body that is no form: JSON, which is held in memory.
MAX_BODY = 4 << 20
#: Uploads that are being received at once.
MAX_UPLOADS = 64
#: Seconds in which something of an upload must come.
IDLE_SECONDS = 60.0
#: Seconds for which what a refused client still sends is read, so that it reads why.
_LINGER_SECONDS = 5.0
#: Seconds for which the free space of the disks is taken to be known, and bytes received meanwhile.
_KNOWN_SECONDS = 2.0
_KNOWN_BYTES = 64 << 20
#: Where files are sent, by the media type that they come in; the last two are DICOM files of a viewer.
_UPLOADS = {
    "multipart/form-data": ("/infer/", "/datastore/", "/session/"),
    "multipart/related": ("/proxy/",),
    "application/dicom": ("/proxy/",),
}


def media_type(header: str) -> str:
    """The media type in a Content-Type header, in small letters."""
    return header.split(";")[0].strip().lower()


class Refusal(Exception):  # noqa: N818 - what is answered, not what went wrong
    """A body that is not taken.

    ``more`` says whether the client may still be sending.

    Args:
        status: HTTP status of the answer.
        detail: Its text.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.more = True


class Disks:
    """How much room is left, looked up off the event loop and not for every request.

    Args:
        places: Folders whose disks must not fill.
        keep: Bytes that stay free on each.
    """

    def __init__(self, places: Sequence[Path], *, keep: int) -> None:
        self._places = places
        self.keep = keep
        self._room = 0
        self._until = 0.0

    def look(self) -> int:
        """Bytes that can be written now."""
        return min(shutil.disk_usage(place).free for place in self._places) - self.keep

    async def check(self, coming: int) -> None:
        """Refuse what would fill a disk.

        Args:
            coming: Bytes.

        Raises:
            Refusal: (507) When there is no room for them.
        """
        if time.monotonic() >= self._until:
            self._room = await to_thread.run_sync(self.look)
            self._until = time.monotonic() + _KNOWN_SECONDS
        if coming > self._room:
            raise Refusal(
                507, f"body: {coming} bytes, and the server's disk is full; tell who looks after it"
            )


class Bodies:
    """Refuses bodies that are too large for memory, for the disk, or for anyone to have meant them.

    Uploads go to disk as they come; they are refused as soon as their length is known, or passed.

    Args:
        app: The application inside.
        max_upload: Bytes of an upload.
        disks: Where uploads go.
    """

    def __init__(self, app: ASGIApp, *, max_upload: int, disks: Disks) -> None:
        self.app = app
        self._max_upload = max_upload
        self._disks = disks
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        known = "transfer-encoding" not in headers
        uploads = _UPLOADS.get(media_type(headers.get("content-type", "")), ())
        try:
            if known and not (length.isdigit() and len(length) < 20):
                raise Refusal(400, f"content-length: {length[:20]!r} is no number")
            size = int(length) if known else 0
            if scope["path"].startswith(uploads):
                self._check_length(size)
                await self._disks.check(size)
                await self._upload(scope, receive, send)
            elif not known or size > MAX_BODY:
                text = f"body: send its length, {MAX_BODY} bytes at most; files go into a multipart form"
                raise Refusal(413, text)
            else:
                await self.app(scope, receive, send)
        except Refusal as refusal:
            await _answer(refusal, scope, receive, send)

    def _check_length(self, length: int) -> None:
        if length > self._max_upload:
            raise Refusal(413, f"body: send {self._max_upload >> 20} MB at most, as the server was started")

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an upload, and stop reading where it becomes too much."""
        if self._receiving >= MAX_UPLOADS:
            raise Refusal(503, "too many uploads are being received; wait, then go on")
        total, looked, coming, refusal = 0, 0, True, None
        answering = False
        self._receiving += 1

        async def counted() -> Message:
            nonlocal total, looked, coming, refusal
            if not coming:
                return await receive()
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    message = await receive()
                coming = message.get("more_body", False)
                total += len(message.get("body", b""))
                self._check_length(total)
                if total - looked >= _KNOWN_BYTES:
                    looked = total
                    await self._disks.check(0)
            except (Refusal, TimeoutError) as error:
                slow = Refusal(408, f"body: nothing came for {IDLE_SECONDS:.0f} seconds")
                refusal = error if isinstance(error, Refusal) else slow
                refusal.more = coming
                raise refusal from None
            finally:
                self._receiving -= not coming
            return message

        async def unless_refused(message: Message) -> None:
            nonlocal answering
            if refusal is None or answering:
                answering = True
                await send(message)

        try:
            await self.app(scope, counted, unless_refused)
        except Exception:
            if refusal is None or answering:
                raise
        finally:
            self._receiving -= coming
        if refusal is not None and not answering:
            raise refusal


async def _answer(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse; and read on for a while, since a client that is cut off while it sends reads no answer."""
    headers = {"connection": "close", **(RETRY if refusal.status == 503 else {})}
    answer = JSONResponse({"detail": refusal.detail}, refusal.status, headers)

    async def held(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await answer(scope, receive, held)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while refusal.more:
                refusal.more = (await receive()).get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
