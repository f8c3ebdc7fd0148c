"""The API token of a server, and the tokens that are issued to people who know it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from pathlib import Path

from sam_infer.errors import InputError

#: Characters below which a token could be guessed.
MIN_LENGTH = 16
#: Seconds for which an issued token is good: a working day.
LIFETIME = 12 * 3600
#: How an issued token begins: what does not is taken for the API token itself.
ISSUED = "sl1."
_MAKE_ONE = "make a file that only you can read: (umask 077; head -c 32 /dev/urandom | base64 > token)"


def read_token(file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The API token.

    Args:
        file: Where it is; None = as the environment says: ``SAMLOOP_TOKEN_FILE``, else ``SAMLOOP_TOKEN``.
        environ: The environment.

    Returns:
        The token; None where nothing names one.

    Raises:
        InputError: When the file cannot be read, or holds no token. The error never shows what it holds.
    """
    name = environ.get("SAMLOOP_TOKEN_FILE")
    path, argument = (file, "--token-file") if file else (Path(name) if name else None, "SAMLOOP_TOKEN_FILE")
    if path is not None:
        try:
            return check_token(argument, path.expanduser().read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(argument, str(path), f"cannot be read ({error}); {_MAKE_ONE}") from None
    given = environ.get("SAMLOOP_TOKEN")
    return check_token("SAMLOOP_TOKEN", given) if given else None


def check_token(argument: str, text: str) -> str:
    """A token that is long enough and fits into a header, without the white space around it.

    Raises:
        InputError: When it is not. The error never shows it.
    """
    token = text.strip()
    if len(token) < MIN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        shown = f"{len(token)} characters"
        remedy = f"a token is {MIN_LENGTH} or more letters, digits and signs in one piece; {_MAKE_ONE}"
        raise InputError(argument, shown, remedy)
    if token.startswith(ISSUED):
        raise InputError(argument, f"{ISSUED}...", f"this was issued by a server; {_MAKE_ONE}")
    return token


def check_name(text: str) -> str:
    """The name under which somebody works, as it is stored with labels and written to logs.

    Raises:
        InputError: When it is empty, long, or holds what cannot be printed.
    """
    name = text.strip()
    if not 0 < len(name) <= 64 or not name.isprintable():
        raise InputError("username", text, "send the name under which you work, 1 to 64 characters")
    return name


class ApiToken:
    """Checks the API token, and issues tokens that carry a name.

    An issued token is ``sl1.NAME.EXPIRY.SIGNATURE``: the name in base64url, seconds since 1970, and an
    HMAC-SHA256 of what stands before it. Nothing is stored: another API token makes all of them void. The key
    is stretched (scrypt), so that an issued token is of little help in guessing the API token.

    Args:
        secret: The API token.
    """

    def __init__(self, secret: str) -> None:
        self._digest = hashlib.sha256(secret.encode()).digest()
        self._key = hashlib.scrypt(
            secret.encode(), salt=b"samloop issued tokens 1", n=2**14, r=8, p=1, dklen=32
        )

    def matches(self, sent: str) -> bool:
        """Whether this is the API token; takes the same time whatever was sent."""
        return hmac.compare_digest(hashlib.sha256(sent.encode("utf-8", "replace")).digest(), self._digest)

    def issue(self, name: str) -> str:
        """A token for somebody who showed the API token."""
        head = f"{ISSUED}{_encode(name.encode())}.{int(time.time()) + LIFETIME}"
        return f"{head}.{self._sign(head)}"

    def name_of(self, issued: str) -> str | None:
        """The name that an issued token carries; None where it was not issued here, or is no longer good."""
        head, _, signature = issued.rpartition(".")
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._sign(head).encode()):
            return None
        name, _, expiry = head.removeprefix(ISSUED).partition(".")
        if int(expiry) < time.time():
            return None
        return base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()

    def _sign(self, head: str) -> str:
        return _encode(hmac.digest(self._key, head.encode("utf-8", "replace"), "sha256"))


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
