"""A request that one need not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable

import requests


class Call:
    """A request in a thread of its own, for which one can stop to wait; ``abandoned`` when nobody waits.

    Args:
        work: Sends it; called in `start`.
    """

    def __init__(self, work: Callable[[], requests.Response]) -> None:
        self._work = work
        self._done = threading.Event()
        self._lock = threading.Lock()
        self.abandoned = False
        self._response: requests.Response | None = None
        self._error: BaseException | None = None

    def start(self) -> Call:
        """Send it."""
        threading.Thread(target=self._run, name="dicomweb", daemon=True).start()
        return self

    def _run(self) -> None:
        try:
            response = self._work()
        except BaseException as error:  # it belongs to the thread that waits
            self._error = error
        else:
            with self._lock:
                if self.abandoned:
                    response.close()
                self._response = response
        self._done.set()

    def ready(self, seconds: float | None) -> bool:
        """Wait for the answer; False where there is none in that time."""
        return self._done.wait(seconds)

    def abandon(self) -> None:
        """Nobody waits any more; an answer is closed when it comes."""
        with self._lock:
            self.abandoned = True
            if self._response is not None:
                self._response.close()

    def result(self) -> requests.Response:
        """The answer, or what the request raised."""
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response
