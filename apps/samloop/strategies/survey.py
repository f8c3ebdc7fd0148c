"""Looking at some of the cases, within the time that a clinician waits for the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sam_infer.cache import ByteLru
from sam_infer.errors import InputError, UnavailableError
from sam_infer.intensity import Window
from sam_infer.volumes import Image, file_key

T = TypeVar("T")
ReadImage = Callable[[Path], Image]
WindowFor = Callable[[Image, Mapping[str, Any]], Window]


@dataclass(frozen=True, kw_only=True)
class Seen(Generic[T]):
    """What was seen.

    Args:
        values: By id.
        unreadable: Ids of the cases that cannot be read.
    """

    values: dict[str, T]
    unreadable: list[str]


class Survey(Generic[T]):
    """Looks at cases, and remembers what it saw until the file, or what it is looked at with, changes.

    Args:
        read: Path to image; a cached reader.
        window_for: The window of an image for a request.
        size_of: Bytes of what is seen of a case.
        limit: Bytes remembered.
    """

    def __init__(
        self,
        *,
        read: ReadImage,
        window_for: WindowFor,
        size_of: Callable[[T], int] = lambda _: 1,
        limit: int = 100_000,
    ) -> None:
        self._read = read
        self._window_for = window_for
        self._known: ByteLru[T] = ByteLru(limit=limit, size_of=size_of)

    def see(
        self,
        ids: Sequence[str],
        datastore: Any,
        look: Callable[[Image, Window], T],
        *,
        made_by: Hashable,
        seconds: float,
        least: int = 1,
    ) -> Seen[T]:
        """Look at cases in their order.

        Args:
            ids: The cases.
            datastore: Gives their files.
            look: What is seen of an image with its window.
            made_by: What that follows from beside the file, such as a model's fingerprint.
            seconds: No further case is looked at after this time.
            least: Cases looked at however long it takes, where so many can be read.
        """
        start = time.monotonic()
        values: dict[str, T] = {}
        unreadable = []
        for case in ids:
            if len(values) >= least and time.monotonic() - start > seconds:
                break
            try:
                path = Path(datastore.get_image_uri(case))  # of a PACS it is fetched now

                def make(path: Path = path) -> T:
                    image = self._read(path)
                    return look(image, self._window_for(image, {}))

                values[case], _ = self._known.get_or_make((file_key(path), made_by), make)
            except (InputError, UnavailableError, OSError):
                unreadable.append(case)
        return Seen(values=values, unreadable=unreadable)
