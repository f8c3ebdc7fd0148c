"""The threads that infer, and those who wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from sam_infer.errors import UnavailableError

T = TypeVar("T")
#: Inferences that may wait, each with what it was sent.
MAX_WAITING = 32


class InferPool(ThreadPoolExecutor):
    """A pool whose size bounds memory, and that refuses when too many wait or the server stops.

    What runs in it sees the context variables of who asked.

    Args:
        workers: Inferences at once.
    """

    def __init__(self, *, workers: int) -> None:
        super().__init__(max_workers=workers, thread_name_prefix="infer")
        self._counting = threading.Lock()
        self._stopped = False
        self.waiting = 0
        self.running = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As its base.

        Raises:
            UnavailableError: When too many wait, or the server stops.
        """
        with self._counting:
            self._refuse_when_stopped()
            if self.waiting >= MAX_WAITING:
                reason = f"{self.waiting} inferences wait for it already"
                raise UnavailableError("the server", reason, "wait, then ask again")
            self.waiting += 1
        future = super().submit(copy_context().run, self._run, fn, *args, **kwargs)
        future.add_done_callback(self._forget_cancelled)
        return future

    def stop(self) -> None:
        """From now on, answer who waits and who comes that the server stops; what runs goes on."""
        with self._counting:
            self._stopped = True

    def _run(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        with self._counting:
            self.waiting -= 1
            self._refuse_when_stopped()
            self.running += 1
        try:
            return fn(*args, **kwargs)
        finally:
            with self._counting:
                self.running -= 1

    def _forget_cancelled(self, future: Future[Any]) -> None:
        if future.cancelled():
            with self._counting:
                self.waiting -= 1

    def _refuse_when_stopped(self) -> None:
        if self._stopped:
            raise UnavailableError("the server", "it is being stopped", "ask again when it is back")
