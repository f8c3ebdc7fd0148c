"""`/preference`: candidate masks that users rate or rank instead of drawing, for training to learn from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type

from apps.samloop.parts import PartsResponse
from sam_infer.candidates import SOURCES
from sam_infer.candidatesources import make_candidates
from sam_infer.errors import InputError
from sam_infer.geometry import parse_points, parse_roi, put_slice
from sam_infer.prompts.request import parse_slice
from sam_infer.tasks.reply import make_reply
from sam_infer.types import Box, Prompts
from sam_infer.volumes import empty_labelmap

router = APIRouter(prefix="/preference", tags=["Preference"])


@router.post("/candidates")
async def candidates(
    request: Request,
    params: dict[str, Any],
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Make candidates of an object: {"image", "label", "slice", "source", and "box" or "foreground"}.

    ``source`` is "thresholds" (the default), "masks" or "dropout"; ``box`` is [x0, y0, x1, y1] in pixels of
    the slice (voxels i and j), ``foreground`` and ``background`` are points in voxels on it.
    """

    def work() -> dict[str, Any]:
        return _make(params)

    return await asyncio.get_running_loop().run_in_executor(request.app.state.pool, work)


@router.get("/candidates/{candidates_id}")
def bits(candidates_id: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))) -> Response:
    """Candidates as one NRRD label map on the grid of their image: bit n of a voxel is candidate n."""
    instance = app_instance()
    asked = instance.models.preferences.find(candidates_id).asked
    image = instance.library.read(instance.image_path(asked.image_id))
    held = asked.candidates.bits
    if asked.k >= image.shape[2] or held.shape != (image.shape[1], image.shape[0]):
        remedy = f"image {asked.image_id} has another shape by now; ask for candidates again"
        raise InputError("candidates", candidates_id, remedy, status=409)
    labelmap = empty_labelmap(image.shape)
    put_slice(labelmap, asked.k, held)
    file, _ = make_reply(labelmap, image, {"result_extension": ".nrrd"}, slices=[asked.k])
    assert file is not None
    name = f"{candidates_id}{file.kind}"
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return PartsResponse(
        file.parts, media_type=get_mime_type(name) or "application/octet-stream", headers=headers
    )


@router.post("/")
def answer(
    params: dict[str, Any], user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> dict[str, Any]:
    """Answer {"candidates": id} with "ranking" (indices, best first) or "ratings" (1 to 5 each)."""
    sent = params.get("candidates")
    if not isinstance(sent, str):
        raise InputError("candidates", sent, "send the id that POST /preference/candidates returned")
    entry = app_instance().models.preferences.answer(
        sent, ranking=params.get("ranking"), ratings=params.get("ratings"), who=user.username or ""
    )
    return {"candidates": sent, "image": entry.asked.image_id, **entry.answer.record()}


@router.get("/")
def rated(
    image: str | None = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> dict[str, Any]:
    """The rated candidates of an image; without ``image``, the ids of the images that have any."""
    instance = app_instance()
    store = instance.models.preferences
    if not image:
        known = set(instance.datastore().list_images())
        return {"images": [name for name in store.ids() if name in known]}
    instance.image_path(image)
    return {"image": image, **store.get(image).record()}


@router.delete("/")
def remove(
    image: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> dict[str, Any]:
    """Remove the candidates of an image; those that were rated stay in the history."""
    instance = app_instance()
    instance.image_path(image)
    if not instance.models.preferences.remove(image):
        raise InputError(
            "image", image, "it has no rated candidates; GET /preference/ lists those that do", status=404
        )
    return {"image": image}


def _make(params: Mapping[str, Any]) -> dict[str, Any]:
    instance = app_instance()
    labels, encoder = instance.project.labels, instance.models.encoder
    image_id, label, source = params.get("image"), params.get("label"), params.get("source") or SOURCES[0]
    path = instance.image_path(image_id)
    if not isinstance(label, str) or label not in labels:
        raise InputError("label", label, f"choose a label of this project: {', '.join(labels)}")
    if source not in SOURCES:
        raise InputError("source", source, f"choose one of {', '.join(SOURCES)}")
    image = instance.library.read(path)
    k = 0 if image.shape[2] == 1 else parse_slice(params.get("slice"), image.shape)
    if k is None:
        raise InputError("slice", params.get("slice"), f"send a slice index from 0 to {image.shape[2] - 1}")
    prompts = _prompts(params, image.shape, k)
    with instance.ahead.request(), instance.cores.request():
        window = instance.library.window_for(image, {})
        made = make_candidates(encoder, image, k, window, prompts, source)
    name = instance.models.preferences.put_candidates(
        image_id,
        label=label,
        k=k,
        candidates=made,
        prompts=prompts,
        fingerprint=encoder.engine.fingerprint,
    )
    return {
        "candidates": name,
        "image": image_id,
        "label": label,
        "slice": k,
        "source": made.source,
        "count": len(made.masks),
        "distinct": made.distinct,
        "thresholds": list(made.thresholds),
        "predicted_iou": list(made.predicted_iou),
        "areas": made.areas,
    }


def _prompts(params: Mapping[str, Any], shape: tuple[int, int, int], k: int) -> Prompts:
    """What was sent about the object on slice ``k``."""
    kinds = {name: parse_points(name, params.get(name), shape) for name in ("foreground", "background")}
    for name, points in kinds.items():
        if (points[:, 2] != k).any():
            raise InputError(name, params[name], f"candidates lie on one slice; send points on slice {k}")
    prompts = Prompts(
        points=np.concatenate([points[:, :2] for points in kinds.values()]).astype(np.float32),
        point_labels=np.repeat(np.array([1, 0]), [len(points) for points in kinds.values()]),
        box=_box(params.get("box"), shape, k),
    )
    if prompts.is_empty:
        raise InputError(
            "foreground",
            params.get("foreground"),
            "send a box, or at least one foreground point on the slice",
        )
    return prompts


def _box(sent: object, shape: tuple[int, int, int], k: int) -> Box | None:
    if sent is None:
        return None
    remedy = f"send [x0, y0, x1, y1] in pixels of the slice, which has {shape[0]} columns and {shape[1]} rows"
    if not isinstance(sent, list) or len(sent) != 4:
        raise InputError("box", sent, remedy)
    x0, y0, x1, y1 = sent
    try:
        return parse_roi([x0, x1, y0, y1, k, k], shape, name="box").box
    except InputError:
        raise InputError("box", sent, remedy) from None
