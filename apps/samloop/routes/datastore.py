"""What puts files into the datastore, or hands them out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Depends, File, Form, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type
from starlette.background import BackgroundTask

from apps.samloop.incoming import parse_object, received
from apps.samloop.parts import CHUNK
from sam_infer.errors import InputError
from sam_infer.volumes import stem

router = APIRouter(prefix="/datastore", tags=["Datastore"])


@router.put("/", include_in_schema=False, deprecated=True)
@router.put("/image")
def add_image(
    image: str | None = None,
    params: str = Form("{}"),
    file: UploadFile = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Upload an image; its id is the file's name where ``image`` names none."""
    info = _with_user(parse_object("params", params), user)
    with received("file", file) as path:
        return {"image": app_instance().datastore().add_image(image or stem(path), str(path), info)}


@router.get("/image")
def image_file(
    image: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> StreamingResponse:
    """Download an image."""
    return _held("image", image, app_instance().datastore().get_image_uri(image))


@router.get("/label")
def label_file(
    label: str, tag: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> StreamingResponse:
    """Download the label map of an image."""
    return _held("label", label, app_instance().datastore().get_label_uri(label, tag))


@router.put("/label")
def save_label(
    image: str,
    params: str = Form("{}"),
    tag: str = DefaultLabelTag.FINAL.value,
    label: UploadFile = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Save the label map of an image; tag ``final`` accepts the case."""
    info = _with_user(parse_object("params", params), user)
    instance = app_instance()
    with received("label", label) as path:
        saved = instance.datastore().save_label(image, str(path), tag or DefaultLabelTag.FINAL.value, info)
    return {**(instance.on_save_label(image, saved) or {}), "image": image, "label": saved}


@router.get("/dataset")
def archive(
    limit_cases: int | None = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> Response:
    """Accepted cases, images and labels, as a ZIP archive."""
    store = app_instance().datastore()
    if not store.get_labeled_images():
        raise InputError("dataset", 0, "no case has been accepted yet", status=404)
    path = Path(store.get_dataset_archive(limit_cases))
    return FileResponse(
        path, media_type="application/zip", filename="dataset.zip", background=BackgroundTask(path.unlink)
    )


def _held(argument: str, name: str, path: str) -> StreamingResponse:
    """A stored file as it is now: it is open before the reply begins, whatever becomes of its name."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed by whoever sends it
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(argument, name, "no such file in the datastore", status=404) from None
    own = Path(path).name
    plain = quote(own) == own
    shown = f'filename="{own}"' if plain else f"filename*=utf-8''{quote(own)}"
    headers = {
        "content-length": str(os.fstat(file.fileno()).st_size),
        "content-disposition": f"attachment; {shown}",
    }
    return StreamingResponse(_pieces(file), media_type=get_mime_type(path), headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(CHUNK):
            yield piece


def _with_user(info: dict[str, Any], user: User) -> dict[str, Any]:
    return {**info, "user": user.username} if user.username else info
