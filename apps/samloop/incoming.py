"""What clients send: names, JSON and files, checked before anything else sees them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import UploadFile
from monailabel.interfaces.datastore import DefaultLabelTag

from sam_infer.errors import InputError
from sam_infer.volumes import EXTENSIONS, extension, stem

#: Nesting of JSON, far beyond what any request needs.
MAX_DEPTH = 32
#: Bytes of an id: leaves room in a file name for an extension and the history's time stamp.
MAX_ID_BYTES = 180
#: Characters of a background task's request.
MAX_TASK = 10_000
#: No control characters, none that turn the direction of text around, none that Windows has a meaning for.
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069/\\:*?\"<>|]+")
#: Names of devices, with any extension, on a folder that Windows serves.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def is_id(value: str) -> bool:
    """Whether a name can be an image or label id: it cannot leave the store, and its files can be written."""
    try:
        short = 0 < len(value.encode()) <= MAX_ID_BYTES
    except UnicodeEncodeError:
        return False
    plain = bool(_NAME.fullmatch(value)) and not value.startswith(".") and value == value.strip()
    plain = plain and not _DEVICE.fullmatch(value)
    return short and plain and stem(f"{value}.nrrd") == value  # case.seg + .nrrd would be case + .seg.nrrd


def check_id(argument: str, value: str) -> str:
    """An image or label id that cannot leave the store.

    Raises:
        InputError: When it is empty, too long, starts with a dot or holds a path separator.
    """
    if not is_id(value):
        raise InputError(
            argument,
            value,
            f'send an id of 1 to {MAX_ID_BYTES} bytes, none of / \\ : * ? " < > |, no dot at its '
            "start, no .seg at its end, and no name of a device such as CON",
        )
    return value


def same_file(value: str) -> str:
    """What is equal of two ids whose files some file systems take for one: Unicode's form, and capitals."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", value).casefold())


def is_tag(value: str) -> bool:
    """Whether a name can be a tag: a folder that cannot lie outside the store, nor be another one's."""
    plain = bool(_TAG.fullmatch(value)) and not value.endswith(".") and not _DEVICE.fullmatch(value)
    return plain and (value.islower() or value.lower() not in list(DefaultLabelTag))


def check_tag(value: str) -> str:
    """A label tag that cannot leave the store.

    Raises:
        InputError: When it is anything but letters, digits, dot, dash and underscore, or "final" and
            "original" in capitals, which some file systems take for the same.
    """
    if not is_tag(value):
        remedy = "send letters, digits, '.', '-' and '_', 64 at most; final and original in small letters"
        raise InputError("tag", value, remedy)
    return value


def check_result_tag(tag: object) -> str:
    """The tag under which a result is stored, "original" where none is named.

    Raises:
        InputError: When it cannot be a tag, or is the one of accepted labels.
    """
    tag = check_tag(str(tag or DefaultLabelTag.ORIGINAL.value))
    if tag == DefaultLabelTag.FINAL.value:
        raise InputError("label_tag", tag, "a result is not accepted by the one who made it; use another tag")
    return tag


def parse_object(argument: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object that can be stored and sent again.

    Args:
        argument: What the client called it, for errors.
        text: What it sent; empty = {}.

    Raises:
        InputError: When it is not JSON, not an object, or holds what JSON has no word for: NaN, infinity,
            half a character, thousands of digits, or nesting beyond `MAX_DEPTH`.
    """
    try:
        value = json.loads(text) if text else {}
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        shown = text[:200]
        raise InputError(
            argument, shown, f"not JSON that can be stored ({error}); send a JSON object"
        ) from None
    if not isinstance(value, dict):
        raise InputError(argument, value, "send a JSON object")
    if _depth(value) > MAX_DEPTH:
        raise InputError(argument, f"nested {_depth(value)} deep", f"nest at most {MAX_DEPTH} deep")
    return value


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def check_task(request: dict[str, Any]) -> dict[str, Any]:
    """The request of a background task, which travels on a command line.

    Raises:
        InputError: When it is longer than `MAX_TASK` characters.
    """
    length = len(json.dumps(request))
    if length > MAX_TASK:
        raise InputError("body", f"{length} characters", f"send {MAX_TASK} at most")
    return request


@contextmanager
def received(argument: str, upload: UploadFile) -> Iterator[Path]:
    """An uploaded image or label map as a temporary file that keeps its name; gone afterwards.

    Raises:
        InputError: (415) When its extension is none that can be read.
    """
    name = Path(upload.filename or "upload.nii.gz").name
    kind = extension(name)
    if not kind:
        raise InputError(
            argument, upload.filename, f"name the file with one of {', '.join(EXTENSIONS)}", status=415
        )
    folder = Path(tempfile.mkdtemp(prefix="samloop-"))
    try:
        path = folder / (name if is_id(name) else f"upload{kind}")
        with path.open("wb") as target:
            shutil.copyfileobj(upload.file, target, 1 << 20)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)
