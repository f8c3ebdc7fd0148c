"""The served application: MONAI Label's routes, made safe and non-blocking.

Stock MONAI Label runs every route on the event loop, so that one inference stops the server for all. Here
each of its routes runs in a thread, /infer in a pool of its own whose size bounds memory, and the event loop
only moves bytes. Names that a client sends (ids, tags, sessions, models) are checked before any route sees
them; bad input is answered with a 4xx that names the argument, the value and the remedy.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import (
    activelearning,
    batch_infer,
    datastore,
    info,
    login,
    logs,
    model,
    ohif,
    proxy,
    scoring,
    session,
    train,
)
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelException,
)
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import tasks
from monailabel.utils.others.generic import get_mime_type
from starlette.background import BackgroundTask

from apps.samloop.store import check_id, check_tag
from sam_infer.errors import InputError
from sam_infer.volumes import EXTENSIONS, extension

logger = logging.getLogger(__name__)

_SESSION = re.compile(r"[0-9a-fA-F-]{1,64}")
#: Request keys that only the server sets; a client's are dropped.
_SERVER_KEYS = ("model", "image", "image_path", "label_file", "session", "description")
#: Stock routes that are served by this module's own, or not at all: served weights change by training and
#: the publish gate only.
_REPLACED = {
    ("POST", "/train/"),
    ("POST", "/train/{model}"),
    ("GET", "/datastore/dataset"),
    ("PUT", "/model/{model}"),
    ("DELETE", "/model/{model}"),
}
_FAMILIES = {
    "/infer/{model}": ("model", "_infers"),
    "/batch/infer/{model}": ("model", "_infers"),
    "/train/{model}": ("model", "_trainers"),
    "/scoring/{method}": ("method", "_scoring_methods"),
    "/activelearning/{strategy}": ("strategy", "_strategies"),
}


def create_app() -> FastAPI:
    """The FastAPI application, configured by MONAI Label's settings (environment)."""
    pool = ThreadPoolExecutor(thread_name_prefix="infer", max_workers=_workers())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        instance = app_instance()
        instance.server_mode(True)
        instance.on_init_complete()
        await asyncio.get_running_loop().run_in_executor(pool, instance.warm_up)
        logger.info("Ready")
        yield
        pool.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(title="samloop", lifespan=lifespan, redoc_url=None, dependencies=[Depends(_check_names)])
    app.state.pool = pool
    _add_error_handlers(app)
    app.include_router(_infer_router(), tags=["Infer"])
    app.include_router(_train_router(), tags=["Train"])
    app.include_router(_dataset_router(), tags=["Datastore"])
    stock = [info, model, batch_infer, train, activelearning, scoring, datastore, logs, session, ohif]
    for module in [*stock, login] if settings.MONAI_LABEL_AUTH_ENABLE else stock:
        app.include_router(_threaded(module.router))
    app.include_router(proxy.router)
    return app


def _workers() -> int:
    instance = app_instance()
    return int(instance.project.infer_workers)


def _threaded(router: APIRouter) -> APIRouter:
    """A stock router whose coroutine routes, which never await, run in the thread pool instead."""
    threaded = APIRouter()
    for route in router.routes:
        assert isinstance(route, APIRoute)
        methods = sorted(route.methods or ())
        if any((method, route.path) in _REPLACED for method in methods):
            continue
        threaded.add_api_route(
            route.path,
            _in_thread(route.endpoint),
            methods=methods,
            summary=route.summary,
            tags=route.tags,
            response_model=None,
            responses=route.responses,
            include_in_schema=route.include_in_schema,
            deprecated=route.deprecated,
            name=route.name,
        )
    return threaded


def _in_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function with the signature of a coroutine function that never suspends."""

    def run(*args: Any, **kwargs: Any) -> Any:
        coroutine = endpoint(*args, **kwargs)
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        coroutine.close()
        raise RuntimeError(f"{endpoint.__name__} awaits and cannot run in a thread")

    run.__signature__ = inspect.signature(endpoint, eval_str=True)  # type: ignore[attr-defined]
    run.__name__ = endpoint.__name__
    run.__doc__ = endpoint.__doc__
    return run


def _check_names(request: Request) -> None:
    """Refuse names that do not exist or could leave the store, before a route sees them."""
    route = request.scope.get("route")
    path = getattr(route, "path", "")
    query = request.query_params
    if path.startswith(("/infer", "/datastore")):
        for argument in ("image", "label", "id"):
            if query.get(argument):
                check_id(argument, query[argument])
        if query.get("tag"):
            check_tag(query["tag"])
    identifier = request.path_params.get("session_id") or query.get("session_id")
    if identifier and not _SESSION.fullmatch(identifier):
        raise InputError("session_id", identifier, "send the session_id that PUT /session/ returned")
    if path in _FAMILIES:
        argument, attribute = _FAMILIES[path]
        known = getattr(app_instance(), attribute)
        name = request.path_params[argument]
        if name not in known:
            choices = f"choose one of {', '.join(known)}" if known else "this server has none"
            raise InputError(argument, name, choices, status=404)


def _add_error_handlers(app: FastAPI) -> None:
    def answer(status: int, detail: str) -> JSONResponse:
        return JSONResponse({"detail": detail}, status_code=status)

    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(ImageNotFoundException)
    @app.exception_handler(LabelNotFoundException)
    async def not_found(_: Request, error: MONAILabelException) -> JSONResponse:
        return answer(404, str(error.msg))

    @app.exception_handler(MONAILabelException)
    async def stock_error(_: Request, error: MONAILabelException) -> JSONResponse:
        return answer(400, str(error.msg))

    @app.exception_handler(json.JSONDecodeError)
    async def bad_json(_: Request, error: json.JSONDecodeError) -> JSONResponse:
        return answer(400, f"params = {error.doc[:200]!r}: not JSON ({error}); send a JSON object")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        number = secrets.token_hex(4)
        logger.error("Unexpected error %s", number, exc_info=error)
        return answer(500, f"Unexpected {type(error).__name__}; the server's log has it under {number}")


def _train_router() -> APIRouter:
    router = APIRouter()

    @router.post("/train/{model}")
    def start(
        model: str,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        enqueue: bool = False,
        user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)),
    ) -> Any:
        """Start training; answers 409 at once when there are too few accepted cases."""
        instance = app_instance()
        instance._trainers[model].precheck(instance.datastore())
        waiting = any(task["status"] in ("SUBMITTED", "RUNNING") for task in tasks("train"))
        if waiting and not enqueue:
            raise HTTPException(429, "Train Task is Already Running; stop it, or send enqueue=true")
        return train.run_model(model, params, run_sync, enqueue)

    @router.post("/train/", deprecated=True)
    def start_all(
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)),
    ) -> Any:
        """Start every trainer, one after the other, as OHIF asks; ``params`` holds settings by trainer."""
        instance = app_instance()
        for trainer in instance._trainers.values():
            trainer.precheck(instance.datastore())
        return train.run(params, run_sync)

    return router


def _dataset_router() -> APIRouter:
    router = APIRouter()

    @router.get("/datastore/dataset")
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

    return router


def _infer_router() -> APIRouter:
    router = APIRouter()

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
            return _infer(
                model=model,
                image=image,
                session_id=session_id,
                params=params,
                file=file,
                label=label,
                output=output,
            )

        pool = request.app.state.pool
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    return router


def _infer(
    *,
    model: str,
    image: str,
    session_id: str,
    params: str,
    file: UploadFile | None,
    label: UploadFile | None,
    output: str | None,
) -> Response:
    instance = app_instance()
    values = json.loads(params) if params else {}
    if not isinstance(values, dict):
        raise InputError("params", values, "send a JSON object")
    request: dict[str, Any] = {k: v for k, v in values.items() if k not in _SERVER_KEYS}
    request.update(model=model, image=image)
    received: list[str] = []
    try:
        if session_id:
            request["image_path"] = _session_image(instance, session_id)
        elif file is not None:
            received.append(_receive("file", file))
            request["image_path"] = received[-1]
        elif not image:
            raise InputError("image", image, "name an image (?image=ID), a session, or upload a file")
        if label is not None:
            received.append(_receive("label", label))
            request["label_file"] = received[-1]
        result = instance.infer(request)
        if result.get("file"):
            received.append(result["file"])
        return _reply(instance, result, output, image, values)
    finally:
        for path in received:
            Path(path).unlink(missing_ok=True)


def _session_image(instance: MONAILabelApp, session_id: str) -> str:
    sessions = instance.sessions()
    found = sessions.get_session(session_id) if sessions is not None else None
    if found is None:
        raise InputError("session_id", session_id, "no such session; it has expired or never was", status=404)
    return str(found.image)


def _receive(argument: str, upload: UploadFile) -> str:
    """Write an upload to a temporary file that keeps its extension."""
    kind = extension(upload.filename or "image.nii.gz")
    if not kind:
        raise InputError(argument, upload.filename, f"name the file with one of {', '.join(EXTENSIONS)}")
    handle, path = tempfile.mkstemp(prefix="samloop-", suffix=kind)
    with os.fdopen(handle, "wb") as target:
        shutil.copyfileobj(upload.file, target, 1 << 20)
    return path


def _reply(
    instance: MONAILabelApp, result: dict[str, Any], output: str | None, image: str, values: dict[str, Any]
) -> Response:
    path = result.get("file")
    if output == "json" or not path:
        return JSONResponse(result["params"])
    if output == "dicom_seg":
        content = _dicom_seg(instance, path, image, values)
        return Response(content, media_type="application/dicom")
    content = Path(path).read_bytes()
    media = get_mime_type(path) or "application/octet-stream"
    name = Path(path).name
    if output == "image":
        return Response(
            content, media_type=media, headers={"content-disposition": f'attachment; filename="{name}"'}
        )
    boundary = secrets.token_hex(16)
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n'
        f"Content-Type: application/json\r\n\r\n{json.dumps(result['params'])}\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        f"Content-Type: {media}\r\n\r\n"
    )
    body = b"".join([head.encode(), content, f"\r\n--{boundary}--\r\n".encode()])
    return Response(body, media_type=f"multipart/form-data; boundary={boundary}")


def _dicom_seg(instance: MONAILabelApp, path: str, image: str, values: dict[str, Any]) -> bytes:
    from monailabel.datastore.dicom import DICOMWebDatastore
    from monailabel.datastore.utils.convert import nifti_to_dicom_seg

    if not isinstance(instance.datastore(), DICOMWebDatastore):
        raise InputError("output", "dicom_seg", "the studies are no DICOMweb server; ask for image or all")
    if not values.get("label_info"):
        raise InputError("label_info", values.get("label_info"), "DICOM SEG needs label_info in params")
    uri = instance.datastore().get_image_uri(image)
    series = uri[: -len(extension(uri))] if extension(uri) else uri
    segmentation = Path(nifti_to_dicom_seg(series, path, values["label_info"], use_itk=True))
    try:
        return segmentation.read_bytes()
    finally:
        segmentation.unlink(missing_ok=True)
