"""`POST /batch/infer/{model}`: a model over many images, in the background; and the report of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from monailabel.config import settings
from monailabel.endpoints import batch_infer
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import tasks

from apps.samloop import background
from apps.samloop.batch import read_report, runnable
from apps.samloop.batchinfer import report_path, settings_of
from apps.samloop.incoming import check_result_tag, check_task
from sam_infer.errors import InputError
from sam_infer.prompts.request import parse_flag

router = APIRouter(prefix="/batch", tags=["Infer"])


@router.post("/infer/{model}")
def start(
    model: str,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    params: dict[str, Any] | None = None,
    run_sync: bool = False,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)),
) -> Any:
    """Run a model on many images of the datastore, one by one, and store what it finds under ``label_tag``.

    A case that was done before with the same model, settings and file is skipped, so a batch that was stopped
    goes on. ``params``: ``label_tag`` (default original), ``max_batch_size`` (0 = all images), ``restart``
    (true = skip none), ``window_level``, ``window_width``, ``result_extension`` and the model's own options.
    """
    given = params or {}
    task = runnable(app_instance()._infers, model)
    task.fingerprint()  # refuses at once where nothing is trained yet
    values: dict[str, Any] = {
        **settings_of(task, given),
        "label_tag": check_result_tag(given.get("label_tag")),
        "restart": parse_flag("restart", given.get("restart")),
        "max_batch_size": _whole("max_batch_size", given.get("max_batch_size", 0)),
    }
    _whole("max_workers", given.get("max_workers", 1))  # as stock sends it; one image at a time is run
    started = batch_infer.run(model, images, check_task(values), run_sync)
    return read_report(report_path(app_instance(), model)) if run_sync else started


@router.get("/infer")
def status(
    all: bool = False,
    check_if_running: bool = False,
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER)),
) -> Any:
    """The latest batch, all of them, or the one that runs: its status and the last lines it wrote."""
    return background.status_of("batch_infer", every=all, running=check_if_running)


@router.delete("/infer")
def stop(user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))) -> Any:
    """Stop the batch that runs; null where none does."""
    return background.stop("batch_infer")


@router.get("/report/{model}")
def report(model: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))) -> Any:
    """What the last batch of a model did, case by case, and how far it is while it runs."""
    found = read_report(report_path(app_instance(), model))
    running = any(
        task["status"] in ("SUBMITTED", "RUNNING") and task["request"]["model"] == model
        for task in tasks("batch_infer")
    )
    if found is None and not running:
        remedy = f"no batch of it was run yet; start one with POST /batch/infer/{model}"
        raise InputError("model", model, remedy, status=404)
    return {"model": model, "running": running, **(found or {})}


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**6:
        raise InputError(name, value, "send a whole number, 0 or more")
    return value
