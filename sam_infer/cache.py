"""A cache in memory with a limit in bytes, safe between threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteLru(Generic[T]):
    """Keeps the most recently used values up to a total size; a value is made once, however many ask.

    Args:
        limit: Bytes kept at most. A single value larger than that is returned but not kept.
        size_of: Bytes of a value.
    """

    def __init__(self, *, limit: int, size_of: Callable[[T], int]) -> None:
        self.limit = limit
        self._size_of = size_of
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def get(self, key: Hashable) -> T | None:
        """The value under ``key``, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: T) -> None:
        """Keep ``value``; drops the least recently used ones beyond the limit."""
        size = self._size_of(value)
        with self._lock:
            if key in self._values:
                self._bytes -= self._size_of(self._values.pop(key))
            if size > self.limit:
                return
            self._values[key] = value
            self._bytes += size
            while self._bytes > self.limit:
                _, dropped = self._values.popitem(last=False)
                self._bytes -= self._size_of(dropped)

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> tuple[T, bool]:
        """The value under ``key``, made by ``make`` where it is missing.

        Returns:
            The value, and True where it was found rather than made.
        """
        value = self.get(key)
        if value is not None:
            return value, True
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            value = self.get(key)
            if value is not None:
                return value, True
            try:
                value = make()
                self.put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value, False
