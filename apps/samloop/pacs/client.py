"""HTTP to a DICOMweb server that may be slow, down, or no DICOMweb server at all.

A request may take long: a PACS fetches old studies from tape. Whether it is answered late or never is found
out by a small question beside it: where that is not answered either, the server counts as down, all within
`PATIENCE` + `ALIVE` seconds.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ProtocolError

from apps.samloop.pacs.address import Address
from apps.samloop.pacs.breaker import Breaker
from apps.samloop.pacs.call import Call
from sam_infer.errors import UnavailableError

#: Seconds to connect; to an answer, before it is asked whether the server is alive; to the answer to that.
CONNECT, PATIENCE, ALIVE = 1.0, 0.6, 0.9
#: Seconds of silence, before or within an answer, from a server that answers small questions.
SILENCE = 30.0
_CONNECTIONS = 16
#: What urllib3's texts begin with: the connection, as Python writes it.
_CONNECTION = re.compile(r"^\w+\(host=[^)]*\): ")


class RefusedError(UnavailableError):
    """The server answered with an error of its own.

    Args:
        what: See `UnavailableError`.
        reason: See `UnavailableError`.
        remedy: See `UnavailableError`.
        status: The HTTP status.
    """

    def __init__(self, what: str, reason: str, remedy: str, *, status: int) -> None:
        super().__init__(what, reason, remedy)
        self.status = status


class PacsClient:
    """Sends requests to a DICOMweb server, each with a deadline; safe to share between threads.

    Args:
        address: The server.
        breaker: What refuses requests while the server is down.
    """

    def __init__(self, address: Address, *, breaker: Breaker | None = None) -> None:
        self.address = address
        self.what = f"the DICOMweb server {address.url}"
        self._breaker = breaker or Breaker()
        self._asking = threading.Lock()
        self._answered = self._unanswered = -float("inf")
        self._session = _session(address)

    @property
    def answered(self) -> float:
        """When it answered anything last, on `time.monotonic`'s clock."""
        return self._answered

    @property
    def down(self) -> str | None:
        """Why nothing is asked of it at the moment; None while it answers."""
        return self._breaker.reason

    def send(
        self,
        method: str,
        service: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Iterable[tuple[str, str]] | str = (),
        body: Any = None,
        patient: bool = False,
    ) -> requests.Response:
        """Send a request.

        Args:
            method: "GET" or "POST".
            service: "qido", "wado", "stow", or "" for the root itself.
            path: Below it.
            headers: Of the request.
            params: The query.
            body: Bytes, or an open file.
            patient: Never ask whether the server is alive; a thread that nobody waits for sends this.

        Returns:
            The answer as soon as its headers are there, whatever its status; whoever gets it closes it.

        Raises:
            UnavailableError: When there is no answer.
        """
        refusal = self._breaker.refusal()
        if refusal is not None:
            raise self.unavailable(refusal)
        url = self.address.under(service, path)
        # Orthanc finds nothing by a wildcard that is written %2A.
        query = params if isinstance(params, str) else urlencode(list(params), safe="*?")

        def request() -> requests.Response:
            return self._session.request(
                method,
                url,
                params=query,
                data=body,
                headers=dict(headers or {}),
                timeout=(CONNECT, SILENCE),
                stream=True,
                allow_redirects=False,
            )

        def request_again() -> requests.Response:
            """A server may close a kept connection just when the next request comes over it."""
            try:
                return request()
            except requests.ConnectionError as error:
                if call.abandoned or not _closed(error) or hasattr(body, "read"):
                    raise
                return request()

        began = time.monotonic()
        call = Call(request_again)
        call.start()
        if not call.ready(PATIENCE) and not patient:
            try:
                self.alive(began)
            except UnavailableError:
                call.abandon()
                raise
        call.ready(None)
        response = self._told(call.result)
        if response.is_redirect:
            target = response.headers.get("location", "")
            response.close()
            raise self.unavailable(f"it sends its clients on to {target[:200]}; give the URL where it is")
        return response

    def get(
        self,
        service: str,
        path: str,
        *,
        accept: str,
        params: Iterable[tuple[str, str]] = (),
        patient: bool = False,
    ) -> requests.Response:
        """GET; the answer is one of success.

        Raises:
            RefusedError: When the server answers with an error.
            UnavailableError: When it does not answer.
        """
        headers = {"Accept": accept}
        return self.checked(
            self.send("GET", service, path, headers=headers, params=params, patient=patient), path
        )

    def checked(self, response: requests.Response, path: str) -> requests.Response:
        """An answer, unless it is an error.

        Raises:
            RefusedError: When it is.
        """
        if response.ok:
            return response
        status = response.status_code
        reason = f"it answered {status} {response.reason} to {path}"
        response.close()
        remedy = "look into its log"
        if status in (401, 403):
            remedy = "set MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD to a user it knows"
        elif status == 404:
            remedy = "check that --studies is the root of its DICOMweb service"
        raise RefusedError(self.what, reason, remedy, status=status)

    def content(self, response: requests.Response) -> bytes:
        """The whole body of an answer.

        Raises:
            UnavailableError: When it ends before its end.
        """
        with response:
            return self._told(lambda: response.content)

    def pieces(self, response: requests.Response, size: int = 1 << 18) -> Iterable[bytes]:
        """The body of an answer as it comes.

        Raises:
            UnavailableError: When it ends before its end.
        """
        with response:
            iterator = response.iter_content(size)
            while True:
                piece = self._told(lambda: next(iterator, None))
                if piece is None:
                    return
                yield piece

    def alive(self, since: float) -> None:
        """Return when the server has answered anything since some time, or does now.

        Args:
            since: On `time.monotonic`'s clock.

        Raises:
            UnavailableError: When it does not.
        """
        with self._asking:
            if self._answered >= since:
                return
            reason = f"no answer within {PATIENCE + ALIVE:g} s"
            if self._unanswered >= since:  # another thread asked meanwhile
                raise self.unavailable(reason)
            url = self.address.under("qido", "studies")

            def ask() -> requests.Response:
                return self._session.get(
                    url, params={"limit": "1"}, timeout=(CONNECT, ALIVE), allow_redirects=False, stream=True
                )

            call = Call(ask).start()
            if not call.ready(ALIVE):
                call.abandon()
                self._unanswered = time.monotonic()
                self._breaker.failed(reason)
                raise self.unavailable(reason)
            self._told(call.result).close()

    def unavailable(self, reason: str) -> UnavailableError:
        """The error that tells of this server and a reason."""
        return UnavailableError(
            self.what, reason, "try again when it answers; whoever looks after the server: is it running?"
        )

    def _told(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; the breaker learns whether the server was there for it."""
        try:
            result = work()
        except requests.ConnectionError as error:
            reason = _reason(error)
            self._breaker.failed(reason)
            raise self.unavailable(reason) from error
        except (requests.RequestException, OSError) as error:
            raise self.unavailable(_reason(error)) from error
        self._answered = time.monotonic()
        self._breaker.worked()
        return result


def _session(address: Address) -> requests.Session:
    session: requests.Session
    if "googleapis.com" in address.url:
        from dicomweb_client.session_utils import create_session_from_gcp_credentials

        session = create_session_from_gcp_credentials()
    else:
        session = requests.Session()
        if address.user:
            session.auth = (address.user, address.password)
    adapter = HTTPAdapter(pool_maxsize=_CONNECTIONS, max_retries=0)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _closed(error: requests.ConnectionError) -> bool:
    """Whether a connection ended before anything was answered."""
    cause = error.args[0] if error.args else None
    parts = cause.args if isinstance(cause, ProtocolError) else ()
    return any(isinstance(part, ConnectionError) for part in parts)


def _reason(error: BaseException) -> str:
    """What happened, in a word, without the object addresses that urllib3 puts into its texts."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT:g} s"
    if isinstance(error, requests.Timeout):
        return f"silent for {SILENCE:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return f"no trust in its certificate: {_root(error)}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError):
        return "its answer broke off"
    return _root(error)


def _root(error: BaseException) -> str:
    with suppress(AttributeError):
        return _root(error.args[0].reason)  # type: ignore[attr-defined]
    return _CONNECTION.sub("", str(error))[:200] or type(error).__name__
