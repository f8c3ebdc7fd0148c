"""``store_boxes``: the boxes of click requests kept with the case, for training from boxes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sam_infer.errors import InputError
from sam_infer.geometry import Region, parse_roi
from sam_infer.prompts.request import parse_flag, parse_region
from sam_infer.volumes import Image
from trainers.boxes import BoxStore

MODELS = ("sam_click_2d", "sam_click_3d")


@dataclass(frozen=True, kw_only=True)
class ClickBoxes:
    """The boxes of one click request.

    Args:
        image_id: The case.
        label: Whose boxes they are.
        regions: In voxels.
        who: Who drew them.
    """

    image_id: str
    label: str
    regions: tuple[Region, ...]
    who: str

    def store(self, store: BoxStore) -> dict[str, Any]:
        """Add them to those of the case; ``label`` and the number of its boxes."""
        boxes = store.add(self.image_id, self.label, self.regions, who=self.who)
        return {"label": self.label, "boxes": len(boxes.labels[self.label])}


def click_boxes(
    request: Mapping[str, Any], read: Callable[[str], Image], labels: Mapping[str, int]
) -> ClickBoxes | None:
    """What of a request is to be stored.

    Args:
        request: ``store_boxes``, ``label``, ``roi`` and ``boxes`` as sent; ``model``, ``image`` (path),
            ``image_id`` and ``sent_by`` as the server sets them.
        read: Path to image; a cached reader.
        labels: The project's.

    Returns:
        None where nothing is asked for, no box was sent, or the image is none of the datastore.

    Raises:
        InputError: When the label is none of the project, or a box is malformed.
    """
    if request["model"] not in MODELS or not parse_flag("store_boxes", request.get("store_boxes")):
        return None
    image_id = request.get("image_id")
    if not isinstance(image_id, str) or not (request.get("roi") or request.get("boxes")):
        return None
    label = request.get("label")
    if not isinstance(label, str) or label not in labels:
        remedy = f"boxes are stored for a label of the project ({', '.join(labels)}); or turn store_boxes off"
        raise InputError("label", label, remedy)
    shape = read(request["image"]).shape
    region = parse_region(request.get("roi"), shape)
    boxes = request.get("boxes") or []
    if not isinstance(boxes, list):
        raise InputError("boxes", boxes, "send a list of boxes, [i0, i1, j0, j1, k, k] each")
    regions = [*([region] if region else []), *(parse_roi(box, shape, name="boxes") for box in boxes)]
    return ClickBoxes(
        image_id=image_id, label=label, regions=tuple(regions), who=str(request.get("sent_by") or "")
    )
