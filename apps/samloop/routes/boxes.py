"""`/datastore/boxes`: the boxes that weakly supervised training learns from, by case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance

from sam_infer.errors import InputError
from sam_infer.geometry import Region, parse_roi
from trainers.boxes import MAX_BOXES

router = APIRouter(prefix="/datastore", tags=["Datastore"])
_FORM = 'send {"boxes": {"<label>": [[i0, i1, j0, j1, k0, k1], ...]}} in voxels'


@router.get("/boxes")
def boxes(
    image: str | None = None, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))
) -> dict[str, Any]:
    """The boxes of an image, in voxels; without ``image``, the ids of the images that have boxes."""
    instance = app_instance()
    store = instance.models.boxes
    if not image:
        known = set(instance.datastore().list_images())
        return {"images": [name for name in store.ids() if name in known]}
    instance.image_path(image)
    found = store.get(image)
    return {"image": image, **(found.record() if found else {"boxes": {}, "who": None, "when": None})}


@router.put("/boxes")
def replace(
    image: str,
    params: dict[str, Any],
    user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)),
) -> dict[str, Any]:
    """Replace the boxes of an image: {"boxes": {"<label>": [[i0, i1, j0, j1, k0, k1], ...]}} in voxels.

    Both ends of a box belong to it; on a 2D image four numbers will do.
    """
    instance = app_instance()
    shape = instance.library.read(instance.image_path(image)).shape
    labels = _parsed(params.get("boxes"), shape, instance.project.labels)
    stored = instance.models.boxes.put(image, labels, who=user.username or "")
    return {"image": image, **stored.record()}


@router.delete("/boxes")
def remove(
    image: str, user: User = Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))
) -> dict[str, Any]:
    """Remove the boxes of an image; they stay in the history."""
    instance = app_instance()
    instance.image_path(image)
    if not instance.models.boxes.remove(image):
        raise InputError(
            "image", image, "it has no boxes; GET /datastore/boxes lists those that do", status=404
        )
    return {"image": image}


def _parsed(sent: object, shape: tuple[int, int, int], labels: Mapping[str, int]) -> dict[str, list[Region]]:
    """Boxes by label, checked against the project's labels and clipped to the image."""
    if not isinstance(sent, dict):
        raise InputError("boxes", sent, _FORM)
    found = {}
    for label, listed in sent.items():
        if label not in labels:
            raise InputError("boxes", label, f"no label of this project; it has {', '.join(labels)}")
        if not isinstance(listed, list) or len(listed) > MAX_BOXES:
            shown = f"{len(listed)} boxes" if isinstance(listed, list) else listed
            raise InputError(f"boxes.{label}", shown, f"{_FORM}, {MAX_BOXES} at most for a label")
        found[label] = [parse_roi(box, shape, name=f"boxes.{label}") for box in listed]
    return found
