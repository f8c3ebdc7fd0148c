"""Images in memory: each file read once, each image's window chosen once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_infer.cache import ByteLru
from sam_infer.intensity import Window, choose_window
from sam_infer.prompts.request import parse_window
from sam_infer.volumes import Image, file_key, read_image


class ImageLibrary:
    """Reads images through a cache with a limit; a file that changed is read anew.

    Args:
        limit: Bytes of images kept in memory.
        ct: The project's window for CT, in HU; None = percentiles.
        other: The project's window for other volumes; None = percentiles.
    """

    def __init__(self, *, limit: int, ct: Window | None = None, other: Window | None = None) -> None:
        self._images: ByteLru[Image] = ByteLru(limit=limit, size_of=lambda image: image.array.nbytes)
        self._windows: ByteLru[Window] = ByteLru(limit=10_000, size_of=lambda _: 1)
        self._ct = ct
        self._other = other

    def read(self, path: Path | str, *, transient: bool = False) -> Image:
        """The image of a file; see `sam_infer.volumes.read_image` for the errors."""
        path = Path(path)
        if not path.is_file():
            return read_image(path)
        image, _ = self._images.get_or_make(file_key(path), lambda: read_image(path))
        return replace(image, transient=transient)

    def window_for(self, image: Image, request: Mapping[str, Any]) -> Window:
        """The window of an image for a request (its ``window_level`` and ``window_width``, if sent)."""
        requested = parse_window(request)
        if requested is not None:
            return requested
        return self._windows.get_or_make(
            image.key, lambda: choose_window(image.array, ct=self._ct, other=self._other)
        )[0]
