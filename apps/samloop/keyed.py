"""Addresses that carry a token, for clients that cannot send one.

3D Slicer logs in, but fetches images without the token that it got, and its module for reviewers knows no
login at all. Both take any address of a server: under ``/key/TOKEN/`` everything is served as to who sent
that token. It is one that was issued to a person and is good for a working day, never the API token itself,
since addresses are written into settings and histories.
"""

from __future__ import annotations

from urllib.parse import quote

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from apps.samloop.tokens import ISSUED

PREFIX = "/key/"


def keyed_address(base: str, issued: str) -> str:
    """The address that carries an issued token.

    Args:
        base: The server's address, ended by a slash.
        issued: The token.
    """
    return f"{base.rstrip('/')}{PREFIX}{issued}/"


class KeyedAddress:
    """Takes the token out of a path and puts it where it is looked for.

    Args:
        app: The application inside, which lets in by ``Authorization``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        issued, _, rest = scope["path"].removeprefix(PREFIX).partition("/")
        if not (issued.startswith(ISSUED) and issued.isascii()):
            detail = "this address carries no token; the server's page shows one that does, after a login"
            await JSONResponse({"detail": detail}, 401)(scope, receive, send)
            return
        told = {b"authorization", b"cookie"}
        scope["headers"] = [
            *((name, value) for name, value in scope["headers"] if name not in told),
            (b"authorization", f"Bearer {issued}".encode()),
        ]
        scope["path"] = f"/{rest}"
        scope["raw_path"] = quote(scope["path"]).encode()
        if scope["path"] == "/auth/":  # who has this address needs no dialog
            await JSONResponse({"enabled": False})(scope, receive, send)
            return
        await self.app(scope, receive, send)
