"""Middlewares that say who may call, from where, and how often."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from apps.samloop.buckets import Buckets, client_key, is_local
from apps.samloop.identity import CURRENT, Authenticator, RefusedError
from sam_infer.errors import UnavailableError

#: Answered without a token: they tell nothing but whether the server lives, and let people in.
OPEN = {"/health", "/ready", "/login", "/auth/", "/auth/token", "/favicon.ico"}
#: Where the request's scope says who sent it.
USER_KEY = "samloop.user"
#: What a 503 says beside its text: when to try again.
RETRY = {"retry-after": "5"}
_SAFE = {"GET", "HEAD", "OPTIONS"}
#: Of the request rate, what a request costs: the viewer's own files nothing, images of the PACS little, since
#: one page needs hundreds.
_COSTS = (("/health", 0.0), ("/ready", 0.0), ("/ohif/", 0.0), ("/proxy/", 0.02))


class Guard:
    """Lets in who an authenticator knows.

    Args:
        app: The application inside.
        who: Tells who sends a request.
        login: Whether browsers are sent to ``/login``.
    """

    def __init__(self, app: ASGIApp, *, who: Authenticator, login: bool) -> None:
        self.app = app
        self._who = who
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            user = await self._who.user(headers, client_key(scope.get("client")))
        except RefusedError as refused:
            answer: Response = JSONResponse({"detail": refused.detail}, refused.status, refused.headers)
            if self._login and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                query = scope["query_string"].decode("latin-1")
                asked = f"{quote(scope['path'])}?{query}" if query else quote(scope["path"])
                answer = RedirectResponse(f"/login?next={quote(asked, safe='/')}", 303)
            await answer(scope, receive, send)
            return
        except UnavailableError as error:
            await JSONResponse({"detail": str(error)}, 503, RETRY)(scope, receive, send)
            return
        scope[USER_KEY] = user.username
        CURRENT.set(user)
        await self.app(scope, receive, send)


class Addressed:
    """Refuses requests that a page of another origin makes a browser send.

    A page elsewhere can post a form to this server, or have its own name resolve to this computer (DNS
    rebinding) and then read answers too. A browser tells both: in ``Origin``, and in ``Host``.

    Args:
        app: The application inside.
        origins: Other origins that may call.
        hosts: Names by which the server may be called; addresses always may, since no name of another
            stands in their place. None = any.
    """

    def __init__(self, app: ASGIApp, *, origins: Collection[str], hosts: Collection[str] | None) -> None:
        self.app = app
        self._origins = set(origins)
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            refusal = None
            if self._hosts is not None and not self._called_rightly(host):
                refusal = 421, f"host {host[:200]!r}: start the server with --allow-host to be called so"
            elif scope["method"] not in _SAFE and origin and not self._own(origin, host):
                refusal = 403, f"origin {origin[:200]!r}: pages from there may not change anything here"
            if refusal is not None:
                await JSONResponse({"detail": refusal[1]}, refusal[0])(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _called_rightly(self, host: str) -> bool:
        with suppress(ValueError):
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            if name in (self._hosts or ()) or name.endswith(".localhost"):
                return True
            ipaddress.ip_address(name)
            return True
        return False

    def _own(self, origin: str, host: str) -> bool:
        """Whether a page lies on this server, or on one that may call; what ends TLS may hide the port."""
        if origin in self._origins:
            return True
        with suppress(ValueError):
            page, called = urlsplit(origin), urlsplit(f"//{host}")
            port = page.port or {"http": 80, "https": 443}.get(page.scheme)
            ports = {80, 443} if called.port is None else {called.port}
            return page.hostname is not None and page.hostname == called.hostname and port in ports
        return False


class Rate:
    """Refuses clients that ask too often. Those on this computer may ask as often as they like.

    Args:
        app: The application inside.
        per_minute: Requests that an address may send, and as many at once.
    """

    def __init__(self, app: ASGIApp, *, per_minute: int) -> None:
        self.app = app
        self._buckets = Buckets(per_minute=per_minute, burst=per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and not is_local(scope.get("client")):
            cost = next((cost for start, cost in _COSTS if scope["path"].startswith(start)), 1.0)
            wait = self._buckets.take(client_key(scope["client"]), cost) if cost else 0
            if wait:
                detail = {"detail": "too many requests came from this address; wait, then go on"}
                await JSONResponse(detail, 429, {"retry-after": str(int(wait) + 1)})(scope, receive, send)
                return
        await self.app(scope, receive, send)
