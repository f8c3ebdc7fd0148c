"""`sam_scribble`: the MONAI Label task of type scribbles over `sam_infer.scribble`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.prompts.scribbles import parse_scribbles
from sam_infer.scribble import segment_scribbles
from sam_infer.tasks.reply import LabelmapFile, LabelmapTask, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.volumes import read_labelmap

EXTENTS = ("volume", "slices")


class ScribbleInfer(LabelmapTask):
    """A mask from painted strokes.

    Request: ``image`` (path), ``label_file`` (path of the label map with the strokes), ``label_info`` (which
    value is what), ``roi``, ``selected_label_name`` or ``label`` (what is being drawn), ``extent``
    ("volume", or "slices" for the painted ones only), ``window_level``, ``window_width``,
    ``result_extension``, ``result_compress``, ``result_region``.

    Args:
        encoder: The engine behind its caches.
        library: Reads images.
    """

    def __init__(self, *, encoder: SliceEncoder, library: ImageLibrary) -> None:
        super().__init__(
            type="scribbles",
            labels=[],
            dimension=3,
            description=f"Paint foreground and background on a few slices: mask ({encoder.engine.name})",
            config={"extent": list(EXTENTS), "window_level": "", "window_width": ""},
        )
        self._encoder = encoder
        self._library = library

    def is_valid(self) -> bool:
        """True: the engine reports missing weights when it is created."""
        return True

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Answer one scribbles request with a label map and its JSON."""
        watch = Stopwatch()
        label = request.get("selected_label_name") or request.get("label") or "object"
        if not isinstance(label, str):
            raise InputError("label", label, "send the name of the label that is being drawn")
        extent = request.get("extent") or EXTENTS[0]
        if extent not in EXTENTS:
            raise InputError("extent", extent, f"choose one of {', '.join(EXTENTS)}")
        image = self._library.read(request["image"], transient=bool(request.get("transient")))
        sent = request.get("label_file")
        if not sent:
            raise InputError("label", None, "upload the label map with the strokes as the form field label")
        scribbles = parse_scribbles(request, read_labelmap(sent, image), selected=label)
        window = self._library.window_for(image, request)
        watch.mark("load")
        found = segment_scribbles(
            image,
            scribbles,
            encoder=self._encoder,
            window=window,
            mark=watch.mark,
            through=extent == "volume",
        )
        file, facts = make_reply(found.labelmap, image, request, existing=scribbles.existing)
        watch.mark("write")
        return file, {
            "label_names": {} if facts["empty"] else {label: 1},
            "label": label,
            "score": None if math.isnan(found.score) else round(found.score, 4),
            "slices": found.slices,
            "prompts": {
                "foreground_voxels": int(scribbles.foreground.sum()),
                "background_voxels": int(scribbles.background.sum()),
                "roi": None if scribbles.region is None else scribbles.region.bounds,
                "existing_mask": scribbles.existing is not None,
            },
            **facts,
            "propagation": {str(k): why for k, why in found.stops.items()} or None,
            "window": {"level": window.level, "width": window.width},
            "engine": self._encoder.engine.name,
            "embedding_cached": found.cached,
            "latencies": watch.total(),
        }
