"""The served application: MONAI Label's routes, made safe and non-blocking.

Stock MONAI Label runs every route on the event loop, so that one inference stops the server for all. Here
each of its routes runs in a thread, /infer in a pool of its own whose size bounds memory, and the event loop
only moves bytes. Names and JSON that a client sends are checked before any route sees them; bad input is
answered with a 4xx that names the argument, the value and the remedy.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from monailabel.config import settings
from monailabel.endpoints import (
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
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelException,
)
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import stop_background_task
from starlette.types import ASGIApp, Receive, Scope, Send

import apps.samloop.routes.batch as own_batch
import apps.samloop.routes.boxes as own_boxes
import apps.samloop.routes.datastore as own_datastore
import apps.samloop.routes.infer as own_infer
import apps.samloop.routes.learn as own_learn
import apps.samloop.routes.preference as own_preference
import apps.samloop.routes.published as own_published
import apps.samloop.routes.session as own_session
from apps.samloop import page
from apps.samloop.incoming import check_id, check_tag, parse_object
from sam_infer.errors import InputError, UnavailableError

logger = logging.getLogger(__name__)

_SESSION = re.compile(r"[0-9a-fA-F-]{1,64}")
#: Bytes of a body that is no form: JSON, which is held in memory.
MAX_BODY = 4 << 20
#: What the index says of an image or label of itself.
KEPT_INFO = {"id", "name", "path", "strategy", "ts"}
#: Stock routes that are not served: served weights change by the publish gate, and back by a rollback.
_DROPPED = {("PUT", "/model/{model}"), ("DELETE", "/model/{model}")}
_FAMILIES = {
    "/infer/{model}": ("model", "_infers"),
    "/batch/infer/{model}": ("model", "_infers"),
    "/batch/report/{model}": ("model", "_infers"),
    "/train/{model}": ("model", "_trainers"),
    "/scoring/{method}": ("method", "_scoring_methods"),
    "/activelearning/{strategy}": ("strategy", "_strategies"),
}


def create_app() -> FastAPI:
    """The FastAPI application, configured by MONAI Label's settings (environment)."""
    instance = app_instance()
    pool = ThreadPoolExecutor(thread_name_prefix="infer", max_workers=int(instance.project.infer_workers))
    remote = str(settings.MONAI_LABEL_STUDIES).startswith(("http://", "https://"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        instance.server_mode(True)
        instance.on_init_complete()
        await asyncio.get_running_loop().run_in_executor(pool, instance.warm_up)
        logger.info("Ready")
        yield
        for method in ("train", "batch_infer"):
            stop_background_task(method)
        pool.shutdown(wait=True, cancel_futures=True)
        instance.ahead.close()

    app = FastAPI(title="samloop", lifespan=lifespan, redoc_url=None, dependencies=[Depends(_check)])
    app.state.pool = pool
    app.add_middleware(_BoundedBody)
    if settings.MONAI_LABEL_CORS_ORIGINS:
        origins = [str(origin).rstrip("/") for origin in settings.MONAI_LABEL_CORS_ORIGINS]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    _add_error_handlers(app)
    taken = set(_DROPPED)
    owns = (
        own_infer,
        own_batch,
        own_learn,
        own_published,
        own_boxes,
        own_preference,
        own_datastore,
        own_session,
    )
    for own in (module.router for module in owns):
        app.include_router(own)
        taken |= {(method, route.path) for route in _routes(own) for method in route.methods or ()}
    stock = [info, model, batch_infer, train, scoring, datastore, logs, session, ohif]
    for module in [*stock, login] if settings.MONAI_LABEL_AUTH_ENABLE else stock:
        app.include_router(_threaded(module.router, taken))
    if remote:
        app.include_router(proxy.router)

    @app.get("/", include_in_schema=False)
    def home() -> HTMLResponse:
        """What is served, and every route."""
        return HTMLResponse(page.render(app_instance().info(), app.openapi()["paths"], ohif=remote))

    return app


def _routes(router: APIRouter) -> list[APIRoute]:
    return [route for route in router.routes if isinstance(route, APIRoute)]


def _threaded(router: APIRouter, taken: set[tuple[str, str]]) -> APIRouter:
    """A stock router whose coroutine routes, which never await, run in the thread pool instead."""
    threaded = APIRouter()
    for route in _routes(router):
        methods = sorted(route.methods or ())
        if any((method, route.path) in taken for method in methods):
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


async def _check(request: Request) -> None:
    """Refuse names that do not exist or could leave the store, and JSON that could not be stored."""
    path = getattr(request.scope.get("route"), "path", "")
    query = request.query_params
    if path.startswith(("/infer", "/datastore", "/preference")):
        for argument in ("image", "label", "id"):
            if query.get(argument):
                check_id(argument, query[argument])
        if query.get("tag"):
            check_tag(query["tag"])
        if query.get("check_sum"):
            raise InputError("check_sum", query["check_sum"], "checksums are not compared; leave it out")
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
    if path == "/logs/gpu" and shutil.which("nvidia-smi") is None:
        raise InputError("logs", "gpu", "this server has no NVIDIA GPU", status=404)
    kind = _media_type(request.headers.get("content-type", ""))
    if kind == "application/json" or kind.endswith("+json"):
        body = await request.body()
        if body.strip() != b"null":
            parse_object("body", body)
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        form = await request.form()
        for argument in ("params", "info"):
            text = form.get(argument)
            sent = parse_object(argument, text) if isinstance(text, str) else {}
            for key in KEPT_INFO & set(sent) if path.endswith("info") else ():
                raise InputError(key, sent[key], "the server keeps this itself; leave it out")


def _media_type(header: str) -> str:
    return header.split(";")[0].strip().lower()


class _BoundedBody:
    """Refuses bodies that are held in memory and larger than `MAX_BODY`; uploads go to disk as they come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers") or ())
        form = _media_type(headers.get(b"content-type", b"").decode("latin-1")) == "multipart/form-data"
        upload = form and scope.get("path", "").startswith(("/infer/", "/datastore/", "/session/"))
        if scope["type"] == "http" and not upload:
            length = headers.get(b"content-length", b"0")
            if b"transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_BODY:
                detail = f"body: send its length, {MAX_BODY} bytes at most; files go into a multipart form"
                await JSONResponse({"detail": detail}, status_code=413)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _add_error_handlers(app: FastAPI) -> None:
    def answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": detail}, status_code=status, headers=headers)

    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> JSONResponse:
        return answer(503, str(error), {"retry-after": "5"})

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        told = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return answer(422, "; ".join(told))

    @app.exception_handler(ImageNotFoundException)
    @app.exception_handler(LabelNotFoundException)
    async def not_found(_: Request, error: MONAILabelException) -> JSONResponse:
        return answer(404, str(error.msg))

    @app.exception_handler(MONAILabelException)
    async def stock_error(_: Request, error: MONAILabelException) -> JSONResponse:
        return answer(400, str(error.msg))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        number = secrets.token_hex(4)
        logger.error("Unexpected error %s", number, exc_info=error)
        return answer(500, f"Unexpected {type(error).__name__}; the server's log has it under {number}")
