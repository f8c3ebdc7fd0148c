"""Boxes that users drew around objects, by case: weak labels, kept apart from accepted masks.

One JSON file for each case, whole or not at all; what is replaced or removed goes to the history beside it.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam_infer.errors import InputError
from sam_infer.files import copy_atomic, write_atomic
from sam_infer.geometry import Region
from trainers.data import check_image_id

#: Boxes of one label of a case.
MAX_BOXES = 64
#: A new box that overlaps one of its label by more than this is the same one, drawn again (an own choice).
SAME_BOX_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The boxes of one case.

    Args:
        labels: Boxes in voxels of the image, by label name.
        who: Who drew them last, "" where users have no names.
        when: When that was, ISO 8601 with its time zone.
    """

    labels: Mapping[str, tuple[Region, ...]]
    who: str
    when: str

    def record(self) -> dict[str, Any]:
        """As JSON: ``boxes`` by label name, [i0, i1, j0, j1, k0, k1] each, ``who`` and ``when``."""
        boxes = {label: [region.bounds for region in regions] for label, regions in self.labels.items()}
        return {"boxes": boxes, "who": self.who, "when": self.when}


class BoxStore:
    """A folder of boxes by image id. Safe to use from several threads; other processes may read.

    Args:
        folder: Where the files lie; made on the first write. Earlier versions lie in ``history`` beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._history = folder.parent / "history" / folder.name
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """Ids of the cases that have boxes, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json") if not path.name.startswith("."))

    def get(self, image_id: str) -> Boxes | None:
        """The boxes of a case; None where it has none.

        Raises:
            InputError: (422) When its file is damaged.
        """
        try:
            content = json.loads(self._path(image_id).read_text("utf-8"))
            labels = {
                str(label): tuple(_region(bounds) for bounds in found)
                for label, found in content["boxes"].items()
            }
            return Boxes(labels=labels, who=str(content["who"]), when=str(content["when"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = f"its stored boxes are damaged ({error}); send them again, or delete them"
            raise InputError("image", image_id, remedy, status=422) from error

    def put(self, image_id: str, labels: Mapping[str, Sequence[Region]], *, who: str = "") -> Boxes:
        """Replace the boxes of a case.

        Raises:
            InputError: When a label has more than `MAX_BOXES`.
        """
        with self._lock:
            return self._put(image_id, labels, who)

    def add(self, image_id: str, label: str, regions: Sequence[Region], *, who: str = "") -> Boxes:
        """Add boxes of one label; each takes the place of what it overlaps by more than `SAME_BOX_IOU`.

        Raises:
            InputError: When the label would have more than `MAX_BOXES`.
        """
        with self._lock:
            before = self.get(image_id)
            labels = dict(before.labels) if before is not None else {}
            kept = [old for old in labels.get(label, ()) if not any(_same(old, new) for new in regions)]
            labels[label] = (*kept, *dict.fromkeys(regions))
            if before is not None and labels == before.labels:
                return before
            return self._put(image_id, labels, who)

    def remove(self, image_id: str) -> bool:
        """Take the boxes of a case away; whether there were any."""
        with self._lock:
            self._keep(image_id)
            path = self._path(image_id)
            there = path.is_file()
            path.unlink(missing_ok=True)
            return there

    def _put(self, image_id: str, labels: Mapping[str, Sequence[Region]], who: str) -> Boxes:
        for label, regions in labels.items():
            if len(regions) > MAX_BOXES:
                raise InputError("boxes", f"{len(regions)} of {label}", f"a label has {MAX_BOXES} at most")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        boxes = Boxes(labels={label: tuple(found) for label, found in labels.items()}, who=who, when=now)
        self._keep(image_id)
        write_atomic(self._path(image_id), json.dumps(boxes.record(), ensure_ascii=False).encode())
        return boxes

    def _path(self, image_id: str) -> Path:
        return self.folder / f"{check_image_id(image_id)}.json"

    def _keep(self, image_id: str) -> None:
        path = self._path(image_id)
        if path.is_file():
            copy_atomic(path, self._history / f"{image_id}.{time.time_ns()}.json")


def _region(bounds: Sequence[int]) -> Region:
    i0, i1, j0, j1, k0, k1 = (int(bound) for bound in bounds)
    return Region(low=(i0, j0, k0), high=(i1, j1, k1))


def _same(a: Region, b: Region) -> bool:
    """Whether two boxes overlap by more than `SAME_BOX_IOU` (intersection over union of their voxels)."""
    low, high = np.maximum(a.low, b.low), np.minimum(a.high, b.high)
    shared = float(np.prod(np.clip(high - low + 1, 0, None)))
    sizes = [float(np.prod(np.subtract(box.high, box.low) + 1)) for box in (a, b)]
    return shared > SAME_BOX_IOU * (sum(sizes) - shared)
