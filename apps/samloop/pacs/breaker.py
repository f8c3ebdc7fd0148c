"""Refusing at once what cannot work now, and finding out by itself when it works again."""

from __future__ import annotations

import threading
import time


class Breaker:
    """Opens on a failure; then, every few seconds, one call is let through to see whether it has passed.

    Args:
        pause: Seconds between the calls that are let through.
    """

    def __init__(self, *, pause: float = 3.0) -> None:
        self._pause = pause
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._next = 0.0

    @property
    def reason(self) -> str | None:
        """Why it is open; None while it is closed."""
        return self._reason

    def refusal(self) -> str | None:
        """Why a call must not be tried now; None lets the caller try, and report what came of it."""
        with self._lock:
            if self._reason is None:
                return None
            now = time.monotonic()
            if now < self._next:
                return self._reason
            self._next = now + self._pause
            return None

    def worked(self) -> None:
        """A call was answered."""
        with self._lock:
            self._reason = None

    def failed(self, reason: str) -> None:
        """A call was not answered."""
        with self._lock:
            self._reason = reason
            self._next = time.monotonic() + self._pause
