"""The versions of a label: who saved which when, each to be downloaded, or put back."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import Response
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type

from apps.samloop.heldfile import held
from apps.samloop.incoming import parse_object
from apps.samloop.journal import acting
from apps.samloop.routes.datastore import name_of, with_user
from sam_infer.errors import InputError

router = APIRouter(prefix="/datastore/label", tags=["Datastore"])
FINAL = DefaultLabelTag.FINAL.value
_SHA256 = re.compile(r"[0-9a-f]{64}")


@router.get("/history")
def history(
    image: str, tag: str | None = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> dict[str, Any]:
    """What became of the labels of an image, oldest first: each version, removal and note."""
    return {"image": image, "versions": app_instance().datastore().label_history(image, tag or None)}


@router.get("/version")
def version(
    request: Request,
    image: str,
    sha256: str,
    tag: str = FINAL,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Response:
    """Download a version of a label; its content is checked."""
    path = app_instance().datastore().label_version(image, tag, _checked(sha256))
    return held(request, "sha256", sha256, lambda: str(path), mime=get_mime_type)


@router.put("/restore")
def restore(
    image: str,
    sha256: str,
    tag: str = FINAL,
    params: str = Form("{}"),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Save an earlier version of a label again, as the newest; ``params`` as with a label that is saved."""
    info = with_user(parse_object("params", params), user)
    instance = app_instance()
    with acting(name_of(user)):
        saved = instance.datastore().restore_label(image, tag, _checked(sha256), info)
    return {**(instance.on_save_label(image, saved) or {}), "image": image, "label": saved}


def _checked(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        remedy = "send the 64 digits that GET /datastore/label/history tells"
        raise InputError("sha256", sha256, remedy)
    return sha256
