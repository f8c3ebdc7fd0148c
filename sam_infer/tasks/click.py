"""`sam_click_2d` and `sam_click_3d`: MONAI Label tasks of type deepgrow over `sam_infer.click`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sam_infer.axes import parse_axis
from sam_infer.click import Segmented, click_slice, click_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.base import Engine
from sam_infer.engines.tuned import TunedEngine
from sam_infer.errors import InputError
from sam_infer.geometry import Region
from sam_infer.intensity import Window
from sam_infer.islands import Removed, parse_islands, remove_islands
from sam_infer.library import ImageLibrary
from sam_infer.prompts.request import Clicks, parse_clicks, parse_zoom
from sam_infer.tasks.reply import LabelmapFile, LabelmapTask, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.volumehistory import VolumeHistory
from sam_infer.volumes import read_labelmap

DESCRIPTION = {
    2: "Click on a slice or draw a box: mask on that slice ({engine})",
    3: "Click or draw a box on one slice: mask through the volume, in both directions ({engine})",
}


class ClickInfer(LabelmapTask):
    """Masks from clicks, a box, or a mask to correct.

    Request: ``image`` (path), ``foreground``, ``background`` (voxels, or column and row on a 2D image),
    ``roi`` ([i0, i1, j0, j1, k0, k1]), ``boxes``, ``lasso``, ``lasso_background``, ``slice``, ``axis`` (3D),
    ``label`` (its name), ``label_file`` (path of a mask to correct or refine), ``mask`` (which of the two),
    ``window_level``, ``window_width``, ``zoom`` (true, false or "auto"), ``keep_largest``,
    ``min_island_voxels``, ``result_extension``, ``result_compress``, ``result_region``.

    Args:
        encoder: The engine behind its caches.
        library: Reads images.
        dimension: 2 = one slice, 3 = propagated through the volume.
        options: Further options that viewers offer, with their defaults: for whoever serves the task.
    """

    def __init__(
        self,
        *,
        encoder: SliceEncoder,
        library: ImageLibrary,
        dimension: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            type="deepgrow",
            labels=[],
            dimension=dimension,
            description=DESCRIPTION[dimension].format(engine=encoder.engine.name),
            config={"window_level": "", "window_width": "", "zoom": "auto", **(options or {})},
        )
        self._encoder = encoder
        self._library = library
        self._history = VolumeHistory()

    def is_valid(self) -> bool:
        """True: the engine reports missing weights when it is created."""
        return True

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Answer one click request with a label map and its JSON."""
        watch = Stopwatch()
        label = request.get("label") or "object"
        if not isinstance(label, str):
            raise InputError("label", label, "send the name of the label that is being drawn")
        image = self._library.read(request["image"], transient=bool(request.get("transient")))
        sent = request.get("label_file")
        existing = read_labelmap(sent, image) > 0 if sent else None
        flat = self.dimension == 2 or image.shape[2] == 1
        axis = 2 if self.dimension == 2 else parse_axis(request, image.shape)
        islands = parse_islands(request)
        clicks = parse_clicks(request, image.shape, existing=existing, axis=axis)
        zoom = parse_zoom(request.get("zoom"))
        window = self._library.window_for(image, request)
        watch.mark("load")
        run = click_slice if flat else partial(click_volume, axis=axis, history=self._history)
        found = run(image, clicks, encoder=self._encoder, window=window, mark=watch.mark, zoom=zoom)
        removed = remove_islands(found.labelmap, islands)
        file, facts = make_reply(
            found.labelmap, image, request, slices=found.slices if flat else None, existing=clicks.existing
        )
        watch.mark("write")
        return file, {
            **self._report(label, clicks, found, removed, window, facts),
            "latencies": watch.total(),
        }

    def _report(
        self,
        label: str,
        clicks: Clicks,
        found: Segmented,
        removed: Removed,
        window: Window,
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        region = clicks.region
        return {
            "label_names": {} if facts["empty"] else {label: 1},
            "label": label,
            "score": round(found.score, 4),
            "slice": found.slices[0] if len(found.slices) == 1 else None,
            "slices": found.slices,
            "prompts": {
                "foreground": clicks.foreground.tolist(),
                "background": clicks.background.tolist(),
                "roi": None if region is None else region.bounds,
                "boxes": [Region.of_box(box, k).turned(found.axis).bounds for k, box in clicks.boxes.items()],
                "rough_masks": sorted(clicks.masks),
                "existing_mask": clicks.existing is not None,
                "ignored_points": found.ignored_points,
            },
            **facts,
            "propagation": {str(k): why for k, why in found.stops.items()} if self.dimension == 3 else None,
            "axis": found.axis,
            "decoded_slices": found.decoded if self.dimension == 3 else None,
            "walked": _spans(found.walked) if self.dimension == 3 else None,
            "removed_islands": {"components": removed.components, "voxels": removed.voxels},
            "window": {"level": window.level, "width": window.width},
            "engine": self._encoder.engine.name,
            "tuned": _tuned(self._encoder.engine),
            "embedding_cached": found.cached,
            "crop": None if found.crop is None else list(found.crop),
        }


def _tuned(engine: Engine) -> dict[str, Any] | None:
    """Which published model of an engine that learns answered, or why its base did; None for others."""
    if not isinstance(engine, TunedEngine):
        return None
    model, reason = engine.current()
    if model is None:
        return {"round": None, "reason": reason}
    return {"round": model.training.get("round"), "fingerprint": model.fingerprint}


def _spans(slices: list[int]) -> list[list[int]]:
    """Runs of neighbouring slices, [[first, last], ...], of ascending indices."""
    spans: list[list[int]] = []
    for k in slices:
        if spans and spans[-1][1] == k - 1:
            spans[-1][1] = k
        else:
            spans.append([k, k])
    return spans
