"""What puts files into the datastore, hands them out, or takes them away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response
from monailabel.config import settings
from monailabel.endpoints.datastore import ResultType
from monailabel.endpoints.user.auth import DEFAULT_USER, RBAC, User
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type
from starlette.background import BackgroundTask

from apps.samloop.heldfile import held
from apps.samloop.incoming import parse_object, received
from apps.samloop.journal import acting
from sam_infer.errors import InputError
from sam_infer.volumes import stem

router = APIRouter(prefix="/datastore", tags=["Datastore"])


@router.get("/")
def listing(
    output: ResultType | None = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> Response:
    """How many images and labels there are; ``all``: the whole index, ``train``: the accepted cases."""
    store = app_instance().datastore()
    if output == ResultType.all:
        return JSONResponse(store.json())
    return JSONResponse(store.datalist() if output == ResultType.train else store.status())


@router.put("/", include_in_schema=False, deprecated=True)
@router.put("/image")
def add_image(
    image: str | None = None,
    params: str = Form("{}"),
    file: UploadFile = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Upload an image; its id is the file's name where ``image`` names none."""
    info = with_user(parse_object("params", params), user)
    with received("file", file) as path, acting(name_of(user)):
        return {"image": app_instance().datastore().add_image(image or stem(path), str(path), info)}


@router.get("/image")
@router.head("/image")
def image_file(
    request: Request, image: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> Response:
    """Download an image, whole or in ranges."""
    store = app_instance().datastore()
    return held(request, "image", image, lambda: store.get_image_uri(image), mime=get_mime_type)


@router.delete("/", include_in_schema=False, deprecated=True)
@router.delete("/image")
def remove_image(id: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))) -> dict[str, Any]:
    """Remove an image and its labels; the files stay in the history."""
    with acting(name_of(user)):
        app_instance().datastore().remove_image(id)
    return {}


@router.get("/label")
def label_file(
    request: Request, label: str, tag: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> Response:
    """Download the label map of an image, whole or in ranges."""
    store = app_instance().datastore()
    return held(request, "label", label, lambda: store.get_label_uri(label, tag), mime=get_mime_type)


@router.head("/label")
def label_head(
    request: Request,
    tag: str,
    label: str | None = None,
    image: str | None = None,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Response:
    """Whether there is a label map, and how large; ``image`` is what MONAI Label calls its id here."""
    name = label or image
    if not name:
        raise InputError("label", name, "send the id of an image")
    return label_file(request, name, tag, user)


@router.put("/label")
def save_label(
    image: str,
    params: str = Form("{}"),
    tag: str = DefaultLabelTag.FINAL.value,
    label: UploadFile = File(...),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Save the label map of an image; tag ``final`` accepts the case."""
    info = with_user(parse_object("params", params), user)
    info.pop("restored", None)  # what `PUT /datastore/label/restore` alone says
    instance = app_instance()
    with received("label", label) as path, acting(name_of(user)):
        tag = tag or DefaultLabelTag.FINAL.value
        saved = instance.datastore().save_label(image, str(path), tag, info)
    told = instance.datastore().get_label_info(saved, tag)
    sent = {"dicom_seg": told["dicom_seg"]} if "dicom_seg" in told else {}
    return {**(instance.on_save_label(image, saved) or {}), **sent, "image": image, "label": saved}


@router.delete("/label")
def remove_label(
    id: str, tag: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))
) -> dict[str, Any]:
    """Remove a label; its file stays in the history."""
    with acting(name_of(user)):
        app_instance().datastore().remove_label(id, tag)
    return {}


@router.get("/dataset")
def archive(
    limit_cases: int | None = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> Response:
    """Accepted cases, images and labels, as a ZIP archive."""
    store = app_instance().datastore()
    if not store.get_labeled_images():
        raise InputError("dataset", 0, "no case has been accepted yet", status=404)
    try:
        path = Path(store.get_dataset_archive(limit_cases))
    except FileNotFoundError:
        raise InputError(
            "dataset", limit_cases, "a case was changed meanwhile; ask again", status=409
        ) from None
    return FileResponse(
        path, media_type="application/zip", filename="dataset.zip", background=BackgroundTask(path.unlink)
    )


@router.put("/image/info")
def note_image(
    image: str,
    info: str = Form("{}"),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> None:
    """Note something with an image: a JSON object, merged into its info."""
    with acting(name_of(user)):
        app_instance().datastore().update_image_info(image, with_user(parse_object("info", info), user))


@router.put("/label/info")
def note_label(
    label: str,
    tag: str,
    info: str = Form("{}"),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> None:
    """Note something with a label: a JSON object, merged into its info."""
    told = with_user(parse_object("info", info), user)
    with acting(name_of(user)):
        app_instance().datastore().update_label_info(label, tag, told)


@router.put("/updatelabelinfo", include_in_schema=False, deprecated=True)
def note_label_as_reviewer(
    label: str,
    tag: str,
    params: str = Form("{}"),
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> None:
    """The same, as 3D Slicer's reviewer sends it."""
    note_label(label, tag, params, user)


def name_of(user: User) -> str:
    """The name of a user that was checked; "" where everybody is MONAI Label's admin."""
    return "" if user == DEFAULT_USER else user.username


def with_user(info: dict[str, Any], user: User) -> dict[str, Any]:
    """An info with the name of who sent it, as MONAI Label notes it."""
    return {**info, "user": user.username} if user.username else info
