"""From painted strokes to a mask, on their slices or through the volume: the core under `sam_scribble`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sam_infer.click import Segmented, click_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.geometry import put_slice
from sam_infer.intensity import Window
from sam_infer.prompts.request import Clicks, spread
from sam_infer.prompts.scribbles import Scribbles
from sam_infer.prompts.strokes import stroke_points
from sam_infer.step import mask_logits
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts
from sam_infer.volumes import Image, empty_labelmap
from sam_infer.walker import walker_logits

#: Points along the strokes of one slice, of foreground and of background each.
POINTS = 16
#: The same where strokes correct a mask: these are clicks, and replayed as clicks.
CORRECTIONS = 3
#: Painted slices from which an object is propagated, and slices that are answered without propagation.
SEEDS, MAX_SLICES = 12, 64
#: Share of the engine's logits beside the strokes' own likeness, and the strength at which both are cut.
ENGINE_SHARE, STRENGTH = 0.5, 6.0
_SURE = 8.0


def segment_scribbles(
    image: Image,
    scribbles: Scribbles,
    *,
    encoder: SliceEncoder,
    window: Window,
    mark: Callable[[str], None],
    through: bool,
) -> Segmented:
    """Segment what was painted; painted voxels are in or out as painted, whatever the engine says.

    Without an object so far, the points along a slice's strokes are decoded together, and joined by how like
    the strokes each pixel is where both kinds were painted. With one, only strokes that contradict it count,
    as clicks that correct it. Outside the ROI everything stays as it was.

    Args:
        image: The image.
        scribbles: What was painted.
        encoder: Encodes and decodes slices.
        window: The intensity window.
        mark: Called with a stage's name when the stage has ended, for latencies.
        through: True = through the volume, as far as the ROI goes; False = on the painted slices only.

    Returns:
        As `sam_infer.click.click_volume`; the score is NaN where nothing was to be changed.

    Raises:
        InputError: When more than `MAX_SLICES` slices are painted and ``through`` is False.
    """
    strokes = _Strokes(scribbles=scribbles, encoder=encoder, image=image, window=window)
    slices = strokes.slices()
    if scribbles.existing is not None and not slices:
        found = _unchanged(scribbles.existing)
    elif through and not _one_slice(image, scribbles):
        clicks = strokes.clicks(spread(slices, SEEDS))
        found = click_volume(
            image,
            clicks,
            encoder=encoder,
            window=window,
            mark=mark,
            zoom=strokes.zoom,
            decode_seed=strokes.decode,
        )
    else:
        found = strokes.on_slices(slices, mark)
    return replace(found, labelmap=_as_painted(found.labelmap, scribbles))


@dataclass(frozen=True, kw_only=True)
class _Strokes:
    """The strokes of a request beside the image that they were painted on."""

    scribbles: Scribbles
    encoder: SliceEncoder
    image: Image
    window: Window

    @property
    def zoom(self) -> bool | None:
        """A new object's slices are looked at whole, corrections as clicks are; see `SliceEncoder`."""
        return False if self.scribbles.existing is None else None

    def asked(self, k: int) -> tuple[BoolArray, BoolArray]:
        """(H, W) foreground and background strokes of a slice that ask for something."""
        layers = (self.scribbles.foreground, self.scribbles.background)
        foreground, background = (np.ascontiguousarray(layer[:, :, k].T) for layer in layers)
        if self.scribbles.existing is None:
            return foreground, background
        existing = self.scribbles.existing[:, :, k].T
        return foreground & ~existing, background & existing

    def slices(self) -> list[int]:
        """Slices k whose strokes say where the object is, or what of the object so far is wrong."""
        there = self.scribbles.foreground
        if self.scribbles.existing is not None:
            there = np.where(self.scribbles.existing, self.scribbles.background, there)
        return [int(k) for k in np.flatnonzero(there.any(axis=(0, 1)))]

    def clicks(self, slices: list[int]) -> Clicks:
        """Points along the strokes of these slices; for a new object, background of all other slices too."""
        corrected = self.scribbles.existing is not None
        count = CORRECTIONS if corrected else POINTS
        beside = slices if corrected else np.flatnonzero(self.scribbles.background.any(axis=(0, 1))).tolist()
        return Clicks(
            foreground=_voxels({k: stroke_points(self.asked(k)[0], count) for k in slices}),
            background=_voxels({k: stroke_points(self.asked(k)[1], count) for k in beside}),
            region=None if corrected else self.scribbles.region,
            slice=None,
            existing=self.scribbles.existing,
        )

    def decode(self, k: int, prompts: Prompts) -> Candidates:
        """Decode a painted slice, and hold its painted pixels."""
        foreground, background = self.asked(k)
        if self.scribbles.existing is not None:
            found = self.encoder.decode_history(self.image, k, self.window, prompts, zoom=self.zoom)
            logits = found.logits[found.best]
        else:
            if foreground.any():
                prompts = replace(prompts, box=None)
            found = self.encoder.decode(self.image, k, self.window, [prompts], zoom=self.zoom)[0]
            logits = found.logits[found.best]
            if foreground.any() and background.any():
                values = self.encoder.slice_values(self.image, k, self.window)
                logits = ENGINE_SHARE * logits.clip(-STRENGTH, STRENGTH)
                logits += walker_logits(values, foreground, background).clip(-STRENGTH, STRENGTH)
        logits = np.where(foreground, _SURE, np.where(background, -_SURE, logits))
        return Candidates(
            logits=logits[None].astype(np.float32), iou=found.iou[[found.best]], crop=found.crop
        )

    def on_slices(self, slices: list[int], mark: Callable[[str], None]) -> Segmented:
        """Every asked slice by itself."""
        clicks = self.clicks(slices)
        region, existing = clicks.region, clicks.existing
        if not slices and region is not None:
            slices = [(region.low[2] + region.high[2]) // 2]
        if len(slices) > MAX_SLICES:
            raise InputError(
                "extent", "slices", f"{len(slices)} slices are painted, and at most {MAX_SLICES} are answered"
            )
        labelmap = empty_labelmap(self.image.shape)
        if existing is not None:
            labelmap[...] = existing
        cached, scores = True, []
        for k in slices:
            points = clicks.on_slice(k)
            mask = None if existing is None else mask_logits(np.ascontiguousarray(existing[:, :, k].T))
            prompts = replace(points, box=region.box if region else None, mask_logits=mask)
            cached &= self.encoder.prepare(self.image, k, self.window, prompts, zoom=self.zoom)
            found = self.decode(k, prompts)
            put_slice(labelmap, k, found.mask())
            scores.append(float(found.iou[0]))
        mark("decode")
        return Segmented(
            labelmap=labelmap,
            score=float(np.mean(scores)),
            slices=slices,
            ignored_points=0,
            cached=cached,
            stops={},
        )


def _one_slice(image: Image, scribbles: Scribbles) -> bool:
    """True where the object lies on one slice, as the image or the ROI says: there is nowhere to go on to."""
    region = scribbles.region
    return image.shape[2] == 1 or (region is not None and len(region.slices) == 1)


def _unchanged(existing: BoolArray) -> Segmented:
    return Segmented(
        labelmap=np.asfortranarray(existing, np.uint8),
        score=float("nan"),
        slices=[],
        ignored_points=0,
        cached=True,
        stops={},
    )


def _as_painted(labelmap: NDArray[np.uint8], scribbles: Scribbles) -> NDArray[np.uint8]:
    region = scribbles.region
    if region is not None:
        kept = empty_labelmap(labelmap.shape)  # type: ignore[arg-type]
        if scribbles.existing is not None:
            kept[...] = scribbles.existing
        kept[region.voxels] = labelmap[region.voxels]
        labelmap = kept
    labelmap[scribbles.foreground] = 1
    labelmap[scribbles.background] = 0
    return labelmap


def _voxels(points: dict[int, FloatArray]) -> NDArray[np.int64]:
    """(N, 3) voxels of slice points by slice."""
    found = [np.column_stack([xy, np.full(len(xy), k)]) for k, xy in points.items()]
    return np.concatenate([np.zeros((0, 3)), *found]).astype(np.int64)
