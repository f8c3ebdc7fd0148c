"""Where a PACS is, and who asks."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a DICOMweb server is and who asks.

    Args:
        url: Its root, without a slash at the end, a user or a password.
        user: For HTTP's basic authentication; "" = none.
        password: See ``user``.
        qido: Path under the root for searching; "" = none.
        wado: Path under the root for fetching.
        stow: Path under the root for storing.
    """

    url: str
    user: str = ""
    password: str = ""
    qido: str = ""
    wado: str = ""
    stow: str = ""

    def under(self, service: str, path: str) -> str:
        """The URL of a path of a service: "qido", "wado", "stow", or "" for the root itself."""
        prefix = {"qido": self.qido, "wado": self.wado, "stow": self.stow}.get(service, "")
        return "/".join(part.strip("/") for part in (self.url, prefix, path) if part)


def address_of(url: str, *, user: str = "", password: str = "", **prefixes: str | None) -> Address:
    """An address from a URL, which may hold user and password itself (``http://user:password@host/``).

    Args:
        url: The DICOMweb root.
        user: See `Address`; wins over the URL's.
        password: See `Address`.
        **prefixes: ``qido``, ``wado`` and ``stow`` of `Address`; None = "".
    """
    split = urlsplit(url.strip())
    bare = urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2], query="", fragment=""))
    return Address(
        url=bare.rstrip("/"),
        user=user or unquote(split.username or ""),
        password=password if user else unquote(split.password or ""),
        **{name: prefix or "" for name, prefix in prefixes.items()},
    )


def configured_address(url: str) -> Address:
    """The address of a DICOMweb root, with what MONAI Label's settings (environment) say of it.

    Raises:
        InputError: As `address_of`.
    """
    from monailabel.config import settings  # read when it is asked for: others need no settings

    return address_of(
        url,
        user=settings.MONAI_LABEL_DICOMWEB_USERNAME,
        password=settings.MONAI_LABEL_DICOMWEB_PASSWORD,
        qido=settings.MONAI_LABEL_QIDO_PREFIX,
        wado=settings.MONAI_LABEL_WADO_PREFIX,
        stow=settings.MONAI_LABEL_STOW_PREFIX,
    )
