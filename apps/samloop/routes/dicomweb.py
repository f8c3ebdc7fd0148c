"""`/proxy/dicom/...`: the PACS's DICOMweb services for OHIF, which only speaks to the server it comes from.

Below ``qido``, ``wado`` and ``stow``, or without one of them. What the client sends of itself (tokens,
cookies) stays here, and so does what the PACS sends of itself.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, TypeVar

import requests
from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance

from apps.samloop.pacs.client import PacsClient
from apps.samloop.pacs.store import DicomDatastore
from sam_infer.errors import InputError

router = APIRouter(prefix="/proxy/dicom", include_in_schema=False)
SERVICES = ("qido", "wado", "stow")
#: What DICOMweb has at its root; a PACS may have more there, which is nobody's here.
_ROOTS = {"studies", "series", "instances", "bulkdata"}
_SEGMENT = re.compile(r"[A-Za-z0-9._,~-]+")
_ASKED = ("accept", "range", "if-none-match", "if-modified-since", "content-type")
_TOLD = (
    "content-type", "content-length", "content-encoding", "content-range", "accept-ranges", "etag",
    "last-modified", "cache-control", "expires", "warning", "vary",
)  # fmt: skip
_FILES = ("multipart/related", "application/dicom")
_CHUNK = 1 << 16
_IN_MEMORY = 8 << 20
#: The proxy's own threads: a PACS that is silent must not keep those that all other requests need.
_THREADS = ThreadPoolExecutor(64, thread_name_prefix="proxy")
T = TypeVar("T")


@router.get("/{path:path}")
async def fetch(
    request: Request, path: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> StreamingResponse:
    """Ask the PACS."""
    service, below = _place(request, path)
    # Viewers ask for headers where they search.
    service = "wado" if service == "qido" and below.endswith("metadata") else service
    return await _pass_on(request, service, below, None)


@router.post("/{path:path}")
async def store(
    request: Request, path: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> StreamingResponse:
    """Store DICOM files in the PACS: segmentations that a viewer exports, studies that it uploads."""
    _, below = _place(request, path)
    kind = request.headers.get("content-type", "")
    media = kind.partition(";")[0].strip().lower()
    if not re.fullmatch(r"studies(/[0-9.]+)?", below) or media not in _FILES:
        remedy = "POST stores DICOM files: send multipart/related to studies or studies/UID"
        raise InputError("path", f"{path} ({kind})", remedy, status=405)
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="samloop-") as body:
        async for chunk in request.stream():
            await _in_thread(partial(body.write, chunk))
        body.seek(0)
        return await _pass_on(request, "stow", below, body)


async def _pass_on(request: Request, service: str, path: str, body: IO[bytes] | None) -> StreamingResponse:
    client = _client()
    headers = {name: request.headers[name] for name in _ASKED if name in request.headers}
    headers["accept-encoding"] = request.headers.get("accept-encoding", "identity")
    query = request.scope["query_string"].decode("latin-1")
    method = "GET" if body is None else "POST"
    send = partial(client.send, method, service, path, headers=headers, params=query, body=body)
    response = await _in_thread(send)
    if response.status_code >= 500 or response.status_code in (401, 403, 407):
        client.checked(response, path)
    if response.headers.get("content-type", "").startswith("text/html"):  # of a proxy, or a log-in page
        response.close()
        raise client.unavailable(f"its answer to {path} is a web page")
    told = {name: response.headers[name] for name in _TOLD if name in response.headers}
    return StreamingResponse(_pieces(response), status_code=response.status_code, headers=told)


async def _pieces(response: requests.Response) -> AsyncIterator[bytes]:
    """The body as the PACS sent it; where it breaks off, so does the client's."""
    iterator = response.raw.stream(_CHUNK, decode_content=False)
    try:
        while (piece := await _in_thread(partial(next, iterator, None))) is not None:
            yield piece
    finally:
        response.close()


def _place(request: Request, path: str) -> tuple[str, str]:
    """The service that a path is of, and the path below it.

    Raises:
        InputError: When it is none of DICOMweb's.
    """
    raw = request.scope.get("raw_path", b"").lower()
    service, _, below = path.partition("/")
    if service not in SERVICES:
        service, below = "", path
    segments = below.rstrip("/").split("/")
    plain = all(_SEGMENT.fullmatch(s) and s.strip(".") for s in segments)
    if not plain or segments[0] not in _ROOTS or b"%2f" in raw or b"%5c" in raw:
        remedy = f"send a path of DICOMweb below one of {', '.join(sorted(_ROOTS))}"
        raise InputError("path", path, remedy, status=404)
    return service, "/".join(segments)


def _client() -> PacsClient:
    store = app_instance().datastore()
    if not isinstance(store, DicomDatastore):
        raise InputError("path", "/proxy/dicom", "the studies are no DICOMweb server", status=404)
    return store.client


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)
