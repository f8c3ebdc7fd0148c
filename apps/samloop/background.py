"""Trainings and batches that run in processes of their own, as clients are told of them."""

from __future__ import annotations

from typing import Any

import psutil
from fastapi import HTTPException
from monailabel.utils.async_tasks.task import AsyncTask


def status_of(method: str, *, every: bool, running: bool) -> dict[str, Any] | list[dict[str, Any]]:
    """The record of the latest task, or of each.

    Args:
        method: "train" or "batch_infer".
        every: All tasks since the server's start.
        running: Only the one that runs.

    Raises:
        HTTPException: (404) When there is none.
    """
    found, reason = AsyncTask.status(method, every, running)
    if found is None:
        raise HTTPException(404, reason)
    return [_now(task) for task in found] if isinstance(found, list) else _now(found)


def stop(method: str) -> dict[str, Any] | None:
    """End the task that runs.

    Returns:
        Its record with at least one line of ``details``, of which 3D Slicer takes the last; None when none
        runs.
    """
    try:
        task = AsyncTask.stop(method)
    except psutil.NoSuchProcess:  # it has just ended by itself
        return None
    if task is None:
        return None
    told = _now(task)
    return {**told, "details": told.get("details") or ["stopped before it said anything"]}


def _now(task: dict[str, Any]) -> dict[str, Any]:
    """A copy: the thread that reads the task's output goes on adding lines."""
    return {key: value if key != "details" else list(value) for key, value in dict(task).items()}
