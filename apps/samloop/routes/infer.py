"""`POST /infer/{model}` off the event loop, and `POST /batch/infer/{model}`."""

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
from monailabel.endpoints import batch_infer
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type

from apps.samloop.incoming import check_tag, check_task, parse_object, received
from apps.samloop.parts import PartsResponse
from sam_infer.errors import InputError
from sam_infer.tasks.reply import LabelmapFile
from sam_infer.volumes import extension

#: Request keys that only the server sets; a client's are dropped.
SERVER_KEYS = (
    "model", "image", "image_path", "label_file", "label_values", "session", "description", "transient",
)  # fmt: skip
#: What a client may set for a batch; all else of the request belongs to the server.
BATCH_KEYS = (
    "label_tag",
    "max_workers",
    "max_batch_size",
    "window_level",
    "window_width",
    "result_extension",
)

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
    file), or one of the two as ``output`` says.
    """

    def work() -> Response:
        values = parse_object("params", params)
        source: dict[str, Any] = {"model": model, "image": image}
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


@router.post("/batch/infer/{model}")
def batch(
    model: str,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    params: dict[str, Any] | None = None,
    run_sync: bool = False,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)),
) -> Any:
    """Run a model on many images of the datastore and store what it finds under ``label_tag``.

    ``params``: ``label_tag`` (default original), ``max_workers``, ``max_batch_size``, ``window_level``,
    ``window_width``, ``result_extension``.
    """
    values = {key: value for key, value in (params or {}).items() if key in BATCH_KEYS}
    tag = check_tag(str(values.setdefault("label_tag", DefaultLabelTag.ORIGINAL.value)))
    if tag == DefaultLabelTag.FINAL.value:
        raise InputError(
            "label_tag", tag, "results are not accepted by the one who made them; use another tag"
        )
    for name, default in (("max_workers", 1), ("max_batch_size", 0)):
        value = values.setdefault(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**6:
            raise InputError(name, value, "send a whole number, 0 or more")
    return batch_infer.run(model, images, check_task(values), run_sync)


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
        request["result_region"] = False
    file, result = instance.answer({**request, **source})
    if output == "json" or file is None:
        return JSONResponse(result["params"])
    if output == "dicom_seg":
        content = _dicom_seg(instance, file, source["image"], values)
        return Response(content, media_type="application/dicom")
    name = f"samloop-{secrets.token_hex(4)}{file.kind}"
    media = get_mime_type(name) or "application/octet-stream"
    if output == "image":
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return PartsResponse(file.parts, media_type=media, headers=headers)
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n'
        f"Content-Type: application/json\r\n\r\n{json.dumps(result['params'])}\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        f"Content-Type: {media}\r\n\r\n"
    )
    parts = (head.encode(), *file.parts, f"\r\n--{boundary}--\r\n".encode())
    return PartsResponse(parts, media_type=f"multipart/form-data; boundary={boundary}")


def _dicom_seg(instance: MONAILabelApp, file: LabelmapFile, image: str, values: dict[str, Any]) -> bytes:
    from monailabel.datastore.dicom import DICOMWebDatastore
    from monailabel.datastore.utils.convert import nifti_to_dicom_seg

    if not isinstance(instance.datastore(), DICOMWebDatastore):
        raise InputError("output", "dicom_seg", "the studies are no DICOMweb server; ask for image or all")
    if not values.get("label_info"):
        raise InputError("label_info", values.get("label_info"), "DICOM SEG needs label_info in params")
    uri = instance.datastore().get_image_uri(image)
    series = uri[: -len(extension(uri))] if extension(uri) else uri
    path = Path(file.write())
    try:
        segmentation = Path(nifti_to_dicom_seg(series, str(path), values["label_info"], use_itk=True))
    finally:
        path.unlink()
    try:
        return segmentation.read_bytes()
    finally:
        segmentation.unlink(missing_ok=True)
