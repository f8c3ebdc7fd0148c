"""What browsers are told that they may do with an answer."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.samloop.buckets import is_local
from apps.samloop.routes.ohif import BUNDLE, PAGE

_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STRICT = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'self'"
)


def viewer_policy() -> str:
    """What the viewer needs.

    Its page's own scripts, which are known by their digests; workers and images made in memory; style sheets
    made by scripts; and functions made from text, from which the decoders of compressed images are built.
    """
    scripts = _INLINE.findall((BUNDLE / PAGE).read_text("utf-8"))
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    inline = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'self'; script-src 'self' 'unsafe-eval' {inline}; worker-src 'self' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'self'"
    )


class BrowserHeaders:
    """Tells browsers what they may do with an answer, where it does not say so itself.

    Args:
        app: The application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._viewer = viewer_policy()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        viewer = scope["path"].startswith("/ohif/")
        secure = scope["scheme"] == "https" and not is_local(scope.get("client"))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-content-type-options", "nosniff")
                # no-referrer would make browsers send "Origin: null" with the forms of our own pages
                headers.setdefault("referrer-policy", "same-origin")
                headers.setdefault("x-frame-options", "SAMEORIGIN")
                headers.setdefault("cross-origin-opener-policy", "same-origin")
                headers.setdefault("cross-origin-resource-policy", "same-origin")
                headers.setdefault("content-security-policy", self._viewer if viewer else _STRICT)
                headers.setdefault("cache-control", "no-cache" if viewer else "no-store")
                if secure:
                    headers.setdefault("strict-transport-security", "max-age=15552000")
            await send(message)

        await self.app(scope, receive, with_headers)
