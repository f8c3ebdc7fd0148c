"""A gate before a PACS that can be shut, fall silent, or damage what passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests


class Gate:
    """Passes requests on to a PACS as ``mode`` says.

    - "open": as they are.
    - "silent": takes them, and answers nothing while this lasts.
    - "html": answers a page of a hotel's network to everything.
    - "500": answers an error.
    - "cut": passes the first half of each answer, and closes.

    ``asked`` has method, path and headers of each request. ``answer``, where it is set, is asked first: given
    method and path it gives (status, headers, body), or None where the PACS is to answer.

    Args:
        behind: URL of the PACS, with its DICOMweb root.
    """

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.mode = "open"
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.answer: Callable[[str, str], tuple[int, dict[str, str], bytes] | None] = lambda *_: None
        self._opened = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The DICOMweb root as it is seen from before the gate."""
        return f"http://127.0.0.1:{self._port}/dicom-web"

    def start(self) -> None:
        """Listen; on the same port as before."""
        gate = self
        self.mode = "open"

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gate._serve(self)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more: connections are refused, and those that there are closed."""
        self.say("shut")
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def say(self, mode: str) -> None:
        """Change the mode; requests that were kept waiting are closed unanswered."""
        self.mode = mode
        self._opened.set()
        self._opened = threading.Event()

    @contextmanager
    def saying(self, mode: str) -> Iterator[None]:
        """Within this it is in another mode; "shut" refuses connections."""
        if mode == "shut":
            self.stop()
        else:
            self.say(mode)
        try:
            yield
        finally:
            if mode == "shut":
                self.start()
            self.say("open")

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        self.asked.append((handler.command, handler.path, {k.lower(): v for k, v in handler.headers.items()}))
        mode = self.mode
        handler.close_connection = mode != "open"
        if mode == "shut":
            return
        if mode == "silent":
            self._opened.wait(60)
        elif mode == "html":
            self._answer(handler, 200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
        elif mode == "500":
            self._answer(handler, 500, {"Content-Type": "text/plain"}, b"Internal error")
        elif (own := self.answer(handler.command, handler.path)) is not None:
            self._answer(handler, *own)
        else:
            self._pass(handler, body, cut=mode == "cut")

    def _pass(self, handler: BaseHTTPRequestHandler, body: bytes, *, cut: bool) -> None:
        below = handler.path.removeprefix("/dicom-web")
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("host", "connection")}
        answer = requests.request(
            handler.command, self.behind + below, headers=headers, data=body, timeout=60
        )
        told = {k: v for k, v in answer.headers.items() if k.lower() == "content-type"}
        content = answer.content
        self._answer(
            handler, answer.status_code, told, content, sent=content[: len(content) // 2] if cut else None
        )

    def _answer(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        content: bytes,
        *,
        sent: bytes | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content if sent is None else sent)


@contextmanager
def gate_before(url: str) -> Iterator[Gate]:
    """A gate before a PACS; shut at the end."""
    gate = Gate(url)
    gate.start()
    try:
        yield gate
    finally:
        gate.stop()
