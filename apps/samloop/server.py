"""The served application: MONAI Label's routes, made safe and non-blocking.

Stock MONAI Label runs every route on the event loop, so that one inference stops the server for all. Here
each of its routes runs in a thread, /infer in a pool of its own whose size bounds memory, and the event loop
only moves bytes. Names and JSON that a client sends are checked before any route sees them; bad input is
answered with a 4xx that names the argument, the value and the remedy.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
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

import apps.samloop.routes.auth as own_auth
import apps.samloop.routes.batch as own_batch
import apps.samloop.routes.boxes as own_boxes
import apps.samloop.routes.datastore as own_datastore
import apps.samloop.routes.dicomweb as own_dicomweb
import apps.samloop.routes.health as own_health
import apps.samloop.routes.infer as own_infer
import apps.samloop.routes.learn as own_learn
import apps.samloop.routes.ohif as own_ohif
import apps.samloop.routes.preference as own_preference
import apps.samloop.routes.published as own_published
import apps.samloop.routes.session as own_session
import apps.samloop.routes.versions as own_versions
from apps.samloop import page
from apps.samloop.access import Access
from apps.samloop.bodies import media_type
from apps.samloop.browser import BrowserHeaders
from apps.samloop.gauges import metrics_of
from apps.samloop.guard import RETRY, USER_KEY
from apps.samloop.incoming import check_id, check_tag, parse_object
from apps.samloop.keyed import keyed_address
from apps.samloop.lifecycle import Lifecycle
from apps.samloop.observe import Observe
from apps.samloop.perimeter import secure
from apps.samloop.pool import InferPool
from sam_infer.errors import InputError, StorageError, UnavailableError

_SESSION = re.compile(r"[0-9a-fA-F-]{1,64}")
#: What the index says of an image or label of itself.
KEPT_INFO = {"id", "name", "path", "restored", "strategy", "ts"}
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


def create_app(access: Access | None = None) -> FastAPI:
    """The FastAPI application, configured by MONAI Label's settings (environment).

    Args:
        access: Who may use it, and how much; by default everybody who can reach it.
    """
    instance = app_instance()
    pool = InferPool(workers=int(instance.project.infer_workers))
    remote = str(settings.MONAI_LABEL_STUDIES).startswith(("http://", "https://"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        instance.server_mode(True)
        instance.on_init_complete()
        lifecycle.begin()
        yield
        await asyncio.to_thread(lifecycle.end)

    app = FastAPI(
        title="samloop",
        lifespan=lifespan,
        dependencies=[Depends(_check)],
        docs_url=None,  # these two pages fetch scripts from the internet
        redoc_url=None,
    )
    folder = instance.home if remote else Path(instance.studies)
    folder.mkdir(parents=True, exist_ok=True)
    disks = secure(app, access or Access(), folder=folder)
    lifecycle = Lifecycle(instance=instance, pool=pool, disks=disks, folder=folder)
    metrics = metrics_of(instance, pool, disks)
    instance.answered = metrics.answered
    app.add_middleware(Observe, metrics=metrics)
    app.add_middleware(BrowserHeaders)
    app.state.pool, app.state.lifecycle, app.state.metrics = pool, lifecycle, metrics
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
        own_versions,
        own_session,
        own_ohif,
        own_health,
    )
    for own in (module.router for module in owns):
        app.include_router(own)
        taken |= {(method, route.path) for route in _routes(own) for method in route.methods or ()}
    if app.state.door is not None:
        app.include_router(own_auth.router)
    stock = [info, model, batch_infer, train, scoring, datastore, logs, session]
    if settings.MONAI_LABEL_AUTH_ENABLE:
        app.include_router(own_auth.openid)
        taken.add(("POST", "/auth/token"))
        stock.append(login)
    for module in stock:
        app.include_router(_threaded(module.router, taken))
    if remote:
        app.include_router(own_dicomweb.router)

    @app.get("/", include_in_schema=False)
    def home(request: Request) -> HTMLResponse:
        """What is served, and every route."""
        user = request.scope.get(USER_KEY) if app.state.door is not None else None
        issued = request.cookies.get(app.state.door.cookie) if user else None
        address = keyed_address(str(request.base_url), issued) if issued else None
        routes = app.openapi()["paths"]
        text = page.render(app_instance().info(), routes, ohif=remote, user=user, address=address)
        return HTMLResponse(text, headers={"cache-control": "no-store"} if address else None)

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
        # 3D Slicer names a session's volume as the scene does: it is no id, and not looked at.
        unnamed = path.startswith("/infer") and query.get("session_id")
        for argument in ("label", "id") if unnamed else ("image", "label", "id"):
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
    if request.method in ("GET", "HEAD", "DELETE"):
        return  # 3D Slicer's client repeats the type and length of a body that it sent before, and sends none
    kind = media_type(request.headers.get("content-type", ""))
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


def _add_error_handlers(app: FastAPI) -> None:
    def answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": detail}, status_code=status, headers=headers)

    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return answer(error.status, str(error))

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> JSONResponse:
        return answer(503, str(error), RETRY)

    @app.exception_handler(StorageError)
    async def not_written(_: Request, error: StorageError) -> JSONResponse:
        return answer(507, str(error))

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
