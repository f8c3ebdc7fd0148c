"""Starting a training, and asking for the next case."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, HTTPException
from monailabel.config import settings
from monailabel.endpoints import activelearning, train
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import tasks

from apps.samloop import background
from apps.samloop.incoming import check_task
from apps.samloop.pacs.store import DicomDatastore
from sam_infer.errors import InputError

router = APIRouter()
_starting = threading.Lock()


@router.post("/train/{model}", tags=["Train"])
def start(
    model: str,
    params: dict[str, Any] | None = None,
    run_sync: bool = False,
    enqueue: bool = False,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)),
) -> Any:
    """Start training; answers at once when there are too few accepted cases or a setting is wrong."""
    request = _checked(model, params)
    with _starting:
        if not enqueue:
            _refuse_second()
        if not run_sync:
            return train.run_model(model, request, run_sync, enqueue)
    return train.run_model(model, request, run_sync, enqueue)  # one that waits for its end lets others ask


@router.post("/train/", tags=["Train"], deprecated=True)
def start_any(
    params: dict[str, Any] | None = None,
    run_sync: bool = False,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)),
) -> Any:
    """Start a training, as OHIF asks for one without saying which; ``params`` holds settings by trainer.

    It is the one trainer that ``params`` names, else the project's first. Stock runs all of them; here most
    publish the same model.
    """
    trainers = app_instance()._trainers
    named = [name for name in trainers if name in (params or {})]
    name = named[0] if len(named) == 1 else next(iter(trainers), None)
    if name is None:
        raise InputError("train", None, "this server has no trainer", status=404)
    request = _checked(name, (params or {}).get(name))
    with _starting:
        _refuse_second()
        if not run_sync:
            return {name: {"result": train.run_model(name, request, run_sync, True), "detail": None}}
    return {name: {"result": train.run_model(name, request, run_sync, True), "detail": None}}


@router.get("/train/", tags=["Train"])
def status(
    all: bool = False,
    check_if_running: bool = False,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Any:
    """The latest training, all of them, or the one that runs: its status and the last lines it wrote."""
    return background.status_of("train", every=all, running=check_if_running)


@router.delete("/train/", tags=["Train"])
def stop(user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))) -> Any:
    """Stop the training that runs; null where none does."""
    return background.stop("train")


@router.post("/activelearning/{strategy}", tags=["ActiveLearning"])
def next_sample(
    strategy: str,
    params: dict[str, Any] | None = None,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Any:
    """The next case by a strategy; {} when none is left."""
    given = {key: value for key, value in (params or {}).items() if key != "strategy"}
    found = activelearning.sample(strategy, given, user.username)
    if found.get("id"):
        app_instance().prefetch(found["id"])
    return found


def _refuse_second() -> None:
    waiting = any(task["status"] in ("SUBMITTED", "RUNNING") for task in tasks("train"))
    if waiting or any(trainer.stats().get("running") for trainer in app_instance()._trainers.values()):
        raise HTTPException(429, "Train Task is Already Running; stop it, or send enqueue=true")


def _checked(model: str, params: object) -> dict[str, Any]:
    """The settings that this trainer has, checked; what else the body holds never reaches the process."""
    if params is not None and not isinstance(params, Mapping):
        raise InputError(model, params, "send a JSON object with the trainer's settings")
    instance = app_instance()
    trainer = instance._trainers[model]
    request = {key: value for key, value in (params or {}).items() if key in trainer.config()}
    trainer.check(request)
    store = instance.datastore()
    # The training fetches what is not here from a PACS; to count it nobody waits.
    trainer.precheck(store.counted() if isinstance(store, DicomDatastore) else store)
    return check_task(request)
