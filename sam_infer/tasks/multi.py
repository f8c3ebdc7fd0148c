"""`sam_multi`: the MONAI Label task of type deepedit, which takes points for every label at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sam_infer.click import Segmented, click_slice, click_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary
from sam_infer.multi import Labelled, segment_objects
from sam_infer.prompts.multi import BACKGROUND, Objects, parse_objects
from sam_infer.prompts.request import Clicks
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.reply import LabelmapFile, LabelmapTask, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.types import Candidates, Prompts
from sam_infer.volumehistory import VolumeHistory
from sam_infer.volumes import Image, read_labelmap

#: Request keys of this task: a label of one of these names could not be told from them.
RESERVED = (
    "background", "client_id", "description", "image", "label", "label_file", "label_values", "model",
    "reset_state", "restore_label_idx", "result_compress", "result_dtype", "result_extension",
    "result_region", "roi", "save_label", "label_tag", "session", "slice", "transient", "window_level",
    "window_width",
)  # fmt: skip
#: The value of "background" in ``labels``. OHIF maps a name whose index it cannot find, or is 0, to the
#: position at which it was clicked, and that may be another label's index; no voxel has this value.
BACKGROUND_VALUE = 255


class MultiInfer(LabelmapTask):
    """Masks of several labels that exclude each other, from points under the labels' names.

    Request: ``image`` (path), ``<label name>`` for each label (voxels, or column and row on a 2D image),
    ``background``, ``label`` and its ``roi``, ``slice`` (answers that slice only), ``window_level``,
    ``window_width``, ``label_file`` (path of a label map to correct), ``result_extension``,
    ``result_compress``, ``result_region``.

    Args:
        encoder: The engine behind its caches.
        library: Reads images.
        labels: The project's labels, name to value.

    Raises:
        InputError: When a label has the name of a request key.
    """

    def __init__(
        self,
        *,
        encoder: SliceEncoder,
        library: ImageLibrary,
        labels: Mapping[str, int],
    ) -> None:
        for name in sorted(set(labels) & set(RESERVED)):
            raise InputError(
                "labels",
                name,
                "sam_multi takes points under the labels' names; rename it, or leave the model out",
            )
        super().__init__(
            type="deepedit",
            labels={**labels, BACKGROUND: BACKGROUND_VALUE},
            dimension=3,
            description=f"Points for several labels: masks that exclude each other ({encoder.engine.name})",
            config={"window_level": "", "window_width": ""},
        )
        self._encoder = encoder
        self._library = library
        self._labels = dict(labels)
        self._history = VolumeHistory()

    def is_valid(self) -> bool:
        """True: the engine reports missing weights when it is created."""
        return True

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Answer clicks on several labels with a label map and its JSON."""
        watch = Stopwatch()
        image = self._library.read(request["image"], transient=bool(request.get("transient")))
        sent = request.get("label_file")
        existing = read_labelmap(sent, image) if sent else None
        objects = parse_objects(request, image.shape, labels=self._labels, existing=existing)
        window = self._library.window_for(image, request)
        watch.mark("load")

        def segment(clicks: Clicks) -> Segmented:
            return self._one(image, clicks, window, watch)

        def decode(k: int, prompts: Sequence[Prompts]) -> list[Candidates]:
            return self._encoder.decode(image, k, window, prompts)

        found = segment_objects(objects, image.shape, segment=segment, decode=decode)
        watch.mark("compete")
        labelmap, names = numbered(found.labelmap, self._labels, request)
        file, facts = make_reply(labelmap, image, request)
        watch.mark("write")
        return file, {
            **self._report(found, objects, window),
            **facts,
            "label_names": names,
            "latencies": watch.total(),
        }

    def _one(self, image: Image, clicks: Clicks, window: Window, watch: Stopwatch) -> Segmented:
        """The answer to one object's clicks; what the clicks before this one gave is not decoded again."""
        flat = clicks.slice is not None or image.shape[2] == 1
        run = click_slice if flat else partial(click_volume, history=self._history)
        return run(image, clicks, encoder=self._encoder, window=window, mark=watch.mark)

    def _report(self, answer: Labelled, objects: Objects, window: Window) -> dict[str, Any]:
        found = answer.found
        names = {value: name for name, value in self._labels.items()}
        return {
            "score": round(float(np.mean([one.score for one in found.values()])), 4),
            "objects": {
                names[value]: {
                    "score": round(one.score, 4),
                    "slices": one.slices,
                    "foreground": objects.clicks[value].foreground.tolist(),
                    "propagation": {str(k): why for k, why in one.stops.items()} or None,
                }
                for value, one in found.items()
            },
            "prompts": {
                "background": objects.background.tolist(),
                "existing_mask": objects.existing is not None,
            },
            "contested": answer.contested,
            "window": {"level": window.level, "width": window.width},
            "engine": self._encoder.engine.name,
            "embedding_cached": all(one.cached for one in found.values()),
        }
