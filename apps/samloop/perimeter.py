"""The middlewares between the network and the application."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from monailabel.config import settings

from apps.samloop.access import Access
from apps.samloop.bodies import Bodies, Disks
from apps.samloop.guard import Addressed, Guard, Rate
from apps.samloop.identity import Authenticator, OpenId, TokenDoor, answer_current_user
from apps.samloop.keyed import KeyedAddress
from apps.samloop.tokens import ApiToken


def secure(app: FastAPI, access: Access, *, folder: Path) -> Disks:
    """Put the middlewares around an application; requests meet the last one first.

    Args:
        app: The application; ``app.state.door`` becomes what lets people in by token, or None.
        access: Who may use it, and how much.
        folder: Where labels are written.

    Returns:
        The disks that must not fill.
    """
    disks = Disks([folder, Path(tempfile.gettempdir())], keep=access.keep_free)
    app.add_middleware(Bodies, max_upload=access.max_upload, disks=disks)
    door = None
    if access.token is not None:
        door = TokenDoor(ApiToken(access.token), cookie=f"samloop_{settings.MONAI_LABEL_SERVER_PORT}")
    who: Authenticator | None = OpenId() if settings.MONAI_LABEL_AUTH_ENABLE else door
    if who is not None:
        app.add_middleware(Guard, who=who, login=door is not None)
    if door is not None:
        app.add_middleware(KeyedAddress)
    app.state.door = door
    answer_current_user()
    if access.per_minute:
        app.add_middleware(Rate, per_minute=access.per_minute)
    origins = [str(origin).rstrip("/") for origin in settings.MONAI_LABEL_CORS_ORIGINS]
    if origins:
        own: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=origins, **own)
    app.add_middleware(Addressed, origins=origins, hosts=access.hosts)
    return disks
