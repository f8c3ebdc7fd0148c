"""Who may use the server, and how much, as the options of `samloop serve` say.

`apps.samloop.perimeter` holds to it.
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from apps.samloop.tokens import read_token
from sam_infer.errors import InputError

_TOKEN_HELP = (
    "make a token: (umask 077; head -c 32 /dev/urandom | base64 > token), start with --token-file token; "
    "or let everybody who reaches this address do everything: --open"
)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use a server, and how much.

    Args:
        token: The API token; None = nobody is asked for one.
        hosts: Names by which it may be called; None = any.
        max_upload: Bytes of an upload.
        keep_free: Bytes that stay free on the disks that uploads go to.
        per_minute: Requests of an address; 0 = as many as it likes.
    """

    token: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    max_upload: int = 2048 << 20
    keep_free: int = 512 << 20
    per_minute: int = 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``serve``."""
    group = parser.add_argument_group("access", "See docs/operations.md.")
    group.add_argument(
        "--token-file", type=Path, help="file with the token that clients must have (or SAMLOOP_TOKEN_FILE)"
    )
    group.add_argument(
        "--open",
        action="store_true",
        help="let everybody who reaches --host do everything (or SAMLOOP_OPEN=1)",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the server may be called, beside this computer's own; can be repeated",
    )
    group.add_argument("--certfile", type=Path, help="TLS certificate, with the chain, in PEM")
    group.add_argument("--keyfile", type=Path, help="its private key")
    for name, default, what in (
        ("--max-upload-mb", 2048, "largest upload in MB: a CT of 2000 slices is 1000, or 2000 as float"),
        ("--keep-free-mb", 512, "refuse uploads that would leave less than this free on the disk"),
        ("--max-requests-per-minute", 600, "of one address that is not this computer; 0 = no limit"),
    ):
        group.add_argument(name, type=int, default=default, metavar="N", help=f"{what} (default {default})")


def access_of(args: argparse.Namespace, environ: MutableMapping[str, str], *, openid: bool) -> Access:
    """What the options and the environment say.

    The token leaves the environment, which child processes would inherit.

    Args:
        args: As `add_arguments` parsed them, and ``host``.
        environ: The environment.
        openid: Whether MONAI Label's OpenID is on.

    Raises:
        InputError: When they contradict each other, or would serve other computers without having said so.
    """
    token = read_token(args.token_file, environ)
    environ.pop("SAMLOOP_TOKEN", None)
    if token is not None and openid:
        remedy = "users log in by OpenID (MONAI_LABEL_AUTH_ENABLE) or by token; turn one of them off"
        raise InputError("--token-file", "given", remedy)
    known = token is not None or openid
    opened = args.open or environ.get("SAMLOOP_OPEN") == "1"
    if opened and known:
        raise InputError("--open", True, "there is a token, or OpenID; leave --open out, or these")
    if not (known or opened or _loopback(args.host)):
        raise InputError(
            "--host",
            args.host,
            f"other computers can reach it, and nobody is asked who they are; {_TOKEN_HELP}",
        )
    if bool(args.certfile) != bool(args.keyfile):
        raise InputError("--certfile, --keyfile", str(args.certfile or args.keyfile), "give both or none")
    for name in ("max_upload_mb", "keep_free_mb", "max_requests_per_minute"):
        least = 1 if name == "max_upload_mb" else 0
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')}", getattr(args, name), f"give {least} or more")
    return Access(
        token=token,
        hosts=_hosts(args, known=known),
        max_upload=args.max_upload_mb << 20,
        keep_free=args.keep_free_mb << 20,
        per_minute=args.max_requests_per_minute,
    )


def _hosts(args: argparse.Namespace, *, known: bool) -> frozenset[str] | None:
    """Names by which the server may be called.

    Who must show a token is safe from pages that call this computer by a name of their own: a browser sends
    none along. So any name will do there, unless some are given.
    """
    if known and not args.allow_host:
        return None
    own = {"localhost", args.host, socket.gethostname(), socket.getfqdn()}
    return frozenset(name.lower().rstrip(".") for name in own | set(args.allow_host))


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
