"""What the server says about itself: a log, an id for each request, and one line about each.

A line names a request's route, never its path or query: image ids can be names of patients, and OpenID
tokens have been seen in queries.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.samloop.guard import USER_KEY
from apps.samloop.metrics import Metrics

LogFormat = Literal["text", "json"]
#: The id of the request that is being answered, also in the threads that work for it.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
#: Where a record holds what JSON says in fields of their own.
FIELDS = "fields"
#: Asked every few seconds by whoever watches the server: told only when something is wrong.
_WATCHED = {"/health", "/ready", "/metrics"}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

logger = logging.getLogger(__name__)
_requests = logging.getLogger("samloop.request")


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base names it
        """The line, with the request's id where there is one."""
        line, name = super().formatMessage(record), REQUEST_ID.get()
        return f"{line} [{name}]" if name else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, exception, and a record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if name := REQUEST_ID.get():
            told["request_id"] = name
        told |= getattr(record, FIELDS, {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def configure(log_format: LogFormat) -> None:
    """Have everything in this process log to standard error, in one format."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    for name in ("samloop", "apps.samloop"):
        logging.getLogger(name).setLevel(logging.INFO)


class Observe:
    """Gives each request an id, tells of it in one line, counts it, and answers what nobody expected.

    Args:
        app: The application inside.
        metrics: Counts.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        name = sent if _ID.fullmatch(sent) else secrets.token_hex(8)
        token = REQUEST_ID.set(name)
        begun, status, size = time.perf_counter(), 0, 0

        async def watched(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            logger.error("Unexpected error %s", name, exc_info=error)
            if status:
                raise  # what was begun cannot be ended well: the connection is cut
            await _apology(error, name)(scope, receive, watched)
        finally:
            self._tell(scope, status or 499, size, time.perf_counter() - begun)
            REQUEST_ID.reset(token)

    def _tell(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        """Log and count a request; 499 = its client left before an answer began."""
        method, route = scope["method"], getattr(scope.get("route"), "path", "-")
        self._metrics.request(method, route, status, seconds)
        user, client = scope.get(USER_KEY), scope.get("client")
        fields = {
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": size,
            "user": user,
            "client": client[0] if client else None,
        }
        level = logging.DEBUG if route in _WATCHED and status in (200, 503) else logging.INFO
        text = "%s %s %d, %.3f s, %d bytes%s"
        _requests.log(
            level,
            text,
            method,
            route,
            status,
            seconds,
            size,
            f", {user}" if user else "",
            extra={FIELDS: fields},
        )


def _apology(error: Exception, name: str) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return JSONResponse({"detail": "the server's disk is full; tell who looks after it"}, 507)
    detail = f"Unexpected {type(error).__name__}; the server's log has it under {name}"
    return JSONResponse({"detail": detail}, 500)
