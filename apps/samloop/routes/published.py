"""`/published/`: what trainings put in service, and taking it back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance

from trainers.gate import publisher_of, publishers

router = APIRouter(prefix="/published", tags=["Published"])


@router.get("/")
def published(user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))) -> dict[str, Any]:
    """Of each model that was ever trained here: what serves now, why, and how far one can go back."""
    found = publishers(app_instance().home / "models")
    return {name: publisher.state() for name, publisher in found.items()}


@router.post("/{name}/rollback")
def rollback(name: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))) -> dict[str, Any]:
    """Serve what the served weights of a model replaced; refused while a training runs."""
    publisher = publisher_of(app_instance().home / "models", name)
    return {"model": name, **publisher.rollback(who=user.username or "")}
