"""What trainings propose: label maps kept in the store under their trainer's tag, never as accepted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_infer.volumes import Image, labelmap_bytes
from trainers.data import Datastore


def keep_proposal(
    datastore: Datastore,
    image_id: str,
    labelmap: NDArray[np.uint8],
    image: Image,
    *,
    tag: str,
    labels: Mapping[str, int],
    provenance: Mapping[str, Any],
) -> None:
    """Put a proposed label map into the store; what it replaces goes to the store's history.

    Args:
        datastore: The store.
        image_id: Of the case.
        labelmap: (I, J, K) uint8, values of ``labels``.
        image: The image that it lies on.
        tag: The trainer's name.
        labels: Label name to value.
        provenance: Where it comes from; its ``key`` says which training it belongs to.
    """
    present = set(np.unique(labelmap).tolist())
    listed = [{"name": n, "idx": v, "value": v} for n, v in labels.items() if v in present]
    with tempfile.TemporaryDirectory(prefix="samloop-") as folder:
        path = Path(folder, f"{image_id}{'.png' if image.flat else '.nii.gz'}")
        path.write_bytes(labelmap_bytes(labelmap, image.affine, path.name[len(image_id) :]))
        info = {"label_info": listed, "provenance": dict(provenance)}
        datastore.save_label(image_id, str(path), tag, info)


def kept_proposal(datastore: Datastore, image_id: str, *, tag: str, key: str) -> Path | None:
    """The file of the proposal that a training of this key kept for a case; None where there is none."""
    path = datastore.get_label_uri(image_id, tag)
    if not path:
        return None
    known = datastore.get_label_info(image_id, tag).get("provenance") or {}
    return Path(path) if known.get("key") == key else None
