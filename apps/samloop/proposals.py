"""`pseudo_label`: the label that a training proposed for a case, shown to whoever corrects and accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore

from sam_infer.errors import InputError
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.reply import LabelmapFile, LabelmapTask, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.volumes import Image, read_labelmap

#: Tags of labels that trainers store: the trainers' names.
TAGS = ("pseudo_label", "weak_box", "self_training")
_REMEDY = (
    f"no training has stored a label for this case yet; start one of {', '.join(TAGS)} (POST /train/NAME), "
    "or ask a model that segments by itself"
)


class StoredProposal(LabelmapTask):
    """Answers at once with the newest label that a trainer stored for an image.

    While the datastore holds none at all the task is listed without labels, so that 3D Slicer does not run it
    on each next sample.

    Args:
        datastore: Gives MONAI Label's datastore.
        labels: The project's labels, name to value.
        read: Path to image; a cached reader.
    """

    def __init__(
        self,
        *,
        datastore: Callable[[], Datastore],
        labels: Mapping[str, int],
        read: Callable[[Path], Image],
    ) -> None:
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description=f"Label that a training stored for the case ({', '.join(TAGS)})",
        )
        self._datastore = datastore
        self._read = read

    def is_valid(self) -> bool:
        """Always: it is listed while nothing is stored too, without labels."""
        return True

    def info(self) -> dict[str, Any]:
        """As stock; without labels while no label is stored."""
        found = super().info()
        stored = self._datastore().status().get("label_tags", {})
        count = sum(int(stored.get(tag, 0)) for tag in TAGS)
        if not count:
            return {**found, "labels": [], "description": f"{self.description}: none is stored yet"}
        return {**found, "description": f"{self.description}: {count} are stored"}

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Give the stored label of an image.

        Args:
            request: ``image`` = path of a file; ``image_id``, which the server sets to its id in the
                datastore; the keys of `sam_infer.tasks.numbering.numbered` and
                `sam_infer.tasks.reply.make_reply`.

        Returns:
            The label map, and: label_names (name to value, the classes present), tag, provenance (what the
            training noted with the label, and ``stored``, seconds since 1970), latencies in seconds.

        Raises:
            InputError: (404) When the case has none, or is no case of the datastore.
        """
        watch = Stopwatch()
        image_id = request.get("image_id")
        newest = self._newest(image_id) if isinstance(image_id, str) else None
        if newest is None:
            raise InputError("image", image_id, _REMEDY, status=404)
        tag, info = newest
        image = self._read(Path(request["image"]))
        path = self._datastore().get_label_uri(image_id, tag)
        labelmap = np.asfortranarray(read_labelmap(path, image), np.uint8)
        watch.mark("load")
        labelmap, names = numbered(labelmap, self.labels, request)
        file, facts = make_reply(labelmap, image, request)
        watch.mark("write")
        return file, {
            "label_names": names,
            **facts,
            "tag": tag,
            "provenance": {**(info.get("provenance") or {}), "stored": info.get("ts")},
            "latencies": watch.total(),
        }

    def _newest(self, image_id: str) -> tuple[str, dict[str, Any]] | None:
        """Tag and info of the label that was stored last; None where there is none."""
        store = self._datastore()
        there = store.get_labels_by_image_id(image_id)
        found = [(tag, store.get_label_info(image_id, tag)) for tag in TAGS if tag in there]
        return max(found, key=lambda entry: entry[1].get("ts", 0), default=None)
