"""An HTTP response of several pieces, sent as they are: a large label map is never joined or copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

#: Bytes handed to the connection at once; it takes the next when it has passed these on.
CHUNK = 1 << 20


class PartsResponse(Response):
    """A response whose body is held in pieces.

    Args:
        parts: The body, in order.
        media_type: Its content type.
        headers: Further headers.
    """

    def __init__(
        self,
        parts: Sequence[bytes | memoryview],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._parts = parts
        length = str(sum(len(part) for part in parts))
        super().__init__(headers={**(headers or {}), "content-length": length}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for part in self._parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK):
                piece = view[start : start + CHUNK]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
