"""Taking an answer of many files apart as it comes, without holding any of them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

_LARGEST_HEADER = 1 << 14


class BrokenError(ValueError):
    """An answer that is not what its header says, or ends too early."""


def boundary_of(content_type: str) -> bytes | None:
    """The boundary that a ``multipart/related`` content type names; None where it is no multipart type.

    Raises:
        BrokenError: When it is one and names none.
    """
    media, *parameters = (part.strip() for part in content_type.split(";"))
    if not media.lower().startswith("multipart/"):
        return None
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "boundary" and value.strip('" '):
            return value.strip('" ').encode("latin-1")
    raise BrokenError("multipart without a boundary")


def save_parts(pieces: Iterable[bytes], boundary: bytes, folder: Path) -> list[Path]:
    """Write each part of a multipart body into a file.

    Args:
        pieces: The body, cut anywhere.
        boundary: What divides it.
        folder: Where the files go, named part-0, part-1, ...

    Returns:
        The files in the order of the parts.

    Raises:
        BrokenError: When the body ends before its closing boundary.
    """
    reader = _Reader(pieces)
    delimiter = b"\r\n--" + boundary
    for _ in reader.until(delimiter):
        pass
    files: list[Path] = []
    while not reader.starts_with(b"--"):
        reader.header()
        path = folder / f"part-{len(files)}"
        with path.open("wb") as file:
            file.writelines(reader.until(delimiter))
        files.append(path)
    return files


class _Reader:
    """A body with a line end before it, so that its first boundary looks like all others."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = b"\r\n"

    def until(self, delimiter: bytes) -> Iterator[bytes]:
        """What comes before a delimiter, which is passed over."""
        while (at := self._held.find(delimiter)) < 0:
            keep = len(delimiter) - 1
            if len(self._held) > keep:
                yield self._held[:-keep]
                self._held = self._held[-keep:]
            self._more()
        yield self._held[:at]
        self._held = self._held[at + len(delimiter) :]

    def starts_with(self, text: bytes) -> bool:
        while len(self._held) < len(text):
            self._more()
        return self._held.startswith(text)

    def header(self) -> None:
        """Pass over a part's header, and the line end before it."""
        while (at := self._held.find(b"\r\n\r\n")) < 0:
            if len(self._held) > _LARGEST_HEADER:
                raise BrokenError("a part without a header")
            self._more()
        self._held = self._held[at + 4 :]

    def _more(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise BrokenError("ends before its last boundary")
        self._held += piece


def multipart_body(content: bytes, boundary: str) -> tuple[bytes, str]:
    """A body that sends one DICOM file, and its content type."""
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    kind = f'multipart/related; type="application/dicom"; boundary="{boundary}"'
    return head + content + f"\r\n--{boundary}--\r\n".encode(), kind
