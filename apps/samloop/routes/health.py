"""`/health`, `/ready` and `/metrics`: for whoever watches the server."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from apps.samloop.guard import RETRY
from apps.samloop.lifecycle import OK

router = APIRouter(tags=["Health"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the server lives: it answers. Needs no token."""
    return {"status": OK}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether it can do its work: 200, or 503 with what is wrong in ``checks``. Needs no token."""
    checks = await request.app.state.lifecycle.checks()
    fine = all(found == OK for found in checks.values())
    answer = {"ready": fine, "checks": checks}
    return JSONResponse(answer, 200 if fine else 503, None if fine else RETRY)


@router.get("/metrics")
def metrics(request: Request, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))) -> Response:
    """Counters in Prometheus's text format; who reads them needs the token, where there is one."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
