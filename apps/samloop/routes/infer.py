"""`POST /infer/{model}` off the event loop."""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, Response
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type

from apps.samloop.incoming import parse_object, received
from apps.samloop.pacs.store import DicomDatastore
from apps.samloop.parts import PartsResponse
from sam_infer.errors import InputError
from sam_infer.prompts.request import parse_flag
from sam_infer.tasks.reply import LabelmapFile

#: Request keys that only the server sets; a client's are dropped.
SERVER_KEYS = (
    "model", "image", "image_id", "image_path", "label_file", "label_values", "session", "description",
    "transient", "sent_by",
)  # fmt: skip

router = APIRouter(tags=["Infer"])


@router.post("/infer/{model}")
async def infer(
    request: Request,
    model: str,
    image: str = "",
    session_id: str = "",
    params: str = Form("{}"),
    file: UploadFile | None = File(None),
    label: UploadFile | None = File(None),
    output: Literal["image", "json", "all", "dicom_seg"] | None = None,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Response:
    """Run inference on an image of the datastore, of a session, or uploaded as ``file``.

    ``label`` is a mask to correct (or scribbles); the answer is multipart (``params`` JSON and ``image``
    file, and ``uncertainty`` file where ``output_uncertainty`` asks a model for it), or one of the first two
    as ``output`` says.
    """

    def work() -> Response:
        values = parse_object("params", params)
        named = "" if session_id else image
        source: dict[str, Any] = {"model": model, "image": named, "sent_by": user.username or ""}
        if output in (None, "all"):
            source["label_values"] = "contiguous"
        with ExitStack() as stack:
            if session_id:
                source["image_path"] = _session_image(app_instance(), session_id)
            elif file is not None:
                source["image_path"] = str(stack.enter_context(received("file", file)))
            elif not image:
                raise InputError("image", image, "name an image (?image=ID), a session, or upload a file")
            if label is not None:
                source["label_file"] = str(stack.enter_context(received("label", label)))
            return _infer(values, source, output)

    return await asyncio.get_running_loop().run_in_executor(request.app.state.pool, work)


def _session_image(instance: MONAILabelApp, session_id: str) -> str:
    sessions = instance.sessions()
    found = sessions.get_session(session_id) if sessions is not None else None
    if found is None:
        raise InputError("session_id", session_id, "no such session; it has expired or never was", status=404)
    return str(found.image)


def _infer(values: dict[str, Any], source: dict[str, Any], output: str | None) -> Response:
    instance = app_instance()
    request = {key: value for key, value in values.items() if key not in SERVER_KEYS}
    if output == "dicom_seg":
        _pacs(instance, source["image"])
        request["result_region"] = False
        request["result_extension"] = ".nii"
    name, asked = "output_uncertainty", request.get("output_uncertainty")
    if output in ("image", "dicom_seg") and parse_flag(name, asked):
        raise InputError(name, asked, f"output={output} is one file alone; ask with output=all (or json)")
    file, result = instance.answer({**request, **source})
    if output == "json" or file is None:
        return JSONResponse(result["params"])
    if output == "dicom_seg":
        made = {**result["params"], "user": source["sent_by"], "model": source["model"]}
        content = _dicom_seg(instance, file, source["image"], made)
        return Response(content, media_type="application/dicom")
    if output == "image":
        headers = {"content-disposition": f'attachment; filename="{_name(file)}"'}
        return PartsResponse(file.parts, media_type=_media(file), headers=headers)
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n'
        f"Content-Type: application/json\r\n\r\n{json.dumps(result['params'])}\r\n"
    )
    parts: list[bytes | memoryview] = [head.encode()]
    for name, one in (("image", file), ("uncertainty", file.uncertainty)):
        if one is not None:
            head = (
                f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{_name(one)}"\r\n'
                f"Content-Type: {_media(one)}\r\n\r\n"
            )
            parts += [head.encode(), *one.parts, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return PartsResponse(parts, media_type=f"multipart/form-data; boundary={boundary}")


def _name(file: LabelmapFile) -> str:
    return f"samloop-{secrets.token_hex(4)}{file.kind}"


def _media(file: LabelmapFile) -> str:
    return get_mime_type(_name(file)) or "application/octet-stream"


def _dicom_seg(instance: MONAILabelApp, file: LabelmapFile, image: str, params: dict[str, Any]) -> bytes:
    """A result as DICOM SEG, with the names that the reply gives its values."""
    names = {value: name for name, value in params.get("label_names", {}).items()}
    path = Path(file.write())
    try:
        store = _pacs(instance, image)
        return store.seg_file(image, path, names=names or {1: str(params.get("label") or "")}, info=params)
    finally:
        path.unlink()


def _pacs(instance: MONAILabelApp, image: str) -> DicomDatastore:
    """The datastore of DICOM series, where an image is one of them."""
    store = instance.datastore()
    if not isinstance(store, DicomDatastore):
        raise InputError("output", "dicom_seg", "the studies are no DICOMweb server; ask for image or all")
    if not image:
        raise InputError("output", "dicom_seg", "only an image of the datastore has a DICOM series")
    return store
