"""From clicks to a mask: one slice, or a whole object through slices. The core under the click tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sam_infer.axes import turned_array, turned_clicks, turned_image
from sam_infer.correct import correct_volume
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.base import VideoEngine
from sam_infer.errors import InputError
from sam_infer.follow import Follower
from sam_infer.geometry import Region, put_slice, slice_distance
from sam_infer.intensity import Window
from sam_infer.prompts.request import Clicks, choose_slice
from sam_infer.propagate import NOTHING, Volume, propagate
from sam_infer.step import Step, decoded_step, mask_logits
from sam_infer.stoprule import StopRule
from sam_infer.types import Box, Candidates, Crop, Prompts
from sam_infer.volumehistory import Answer, VolumeHistory, mask_key
from sam_infer.volumes import Image, empty_labelmap

#: Strength of the logits of a rough mask beside its box, and without: it is the image that decides.
ROUGH, ROUGH_ALONE = 1.0, 3.0
#: Decodes the prompts of a prompted slice.
SeedDecode = Callable[[int, Prompts], Candidates]


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """The answer to clicks.

    Args:
        labelmap: (I, J, K) uint8, 1 = the object.
        score: Predicted IoU, 0 to 1; of a volume, the mean over its slices.
        slices: The prompted slices.
        ignored_points: Clicks that lie on other slices than the one that a 2D request is about.
        cached: True where every prompted slice's embedding was in the cache.
        stops: 3D only: why the propagation ended, by slice.
        crop: The part of the prompted slice (of several, of the first that was zoomed) that was encoded by
            itself; None = the whole slice.
        axis: The voxel axis along which slices are counted.
        walked: 3D only: slices that were decided anew, ascending; the others are as they were.
        decoded: 3D only: how many slices were decoded.
    """

    labelmap: NDArray[np.uint8]
    score: float
    slices: list[int]
    ignored_points: int
    cached: bool
    stops: dict[int, str]
    crop: Crop | None = None
    axis: int = 2
    walked: list[int] = field(default_factory=list)
    decoded: int = 0


def _on_slice(clicks: Clicks, k: int, box: Box | None) -> Prompts:
    points = clicks.on_slice(k)
    box = clicks.boxes.get(k, box)
    rough = clicks.masks.get(k)
    logits = None if rough is None else mask_logits(rough, ROUGH_ALONE if box is None else ROUGH)
    if clicks.existing is not None and clicks.existing[:, :, k].any():
        held = np.ascontiguousarray(clicks.existing[:, :, k].T)
        logits = mask_logits(held if rough is None else held | rough)
    return Prompts(
        points=points.points,
        point_labels=points.point_labels,
        box=box,
        mask_logits=logits,
    )


def click_slice(
    image: Image,
    clicks: Clicks,
    *,
    encoder: SliceEncoder,
    window: Window,
    mark: Callable[[str], None],
    zoom: bool | None = None,
) -> Segmented:
    """Segment the object on one slice.

    Args:
        image: The image.
        clicks: Its prompts.
        encoder: Encodes and decodes slices.
        window: The intensity window.
        mark: Called with a stage's name when the stage has ended, for latencies.
        zoom: Whether a small object is encoded by itself; see `SliceEncoder`.

    Raises:
        InputError: When the slice cannot be known or nothing on it says where the object is.
    """
    k = choose_slice(clicks, image.shape)
    region = clicks.region
    box = region.box if region is not None and k in region.slices else None
    prompts = _on_slice(clicks, k, box)
    if prompts.is_empty:
        raise InputError(
            "foreground",
            prompts.points.tolist(),
            f"slice {k} has no foreground point, box or mask; add a foreground point on it",
        )
    cached = encoder.prepare(image, k, window, prompts, zoom=zoom)
    mark("encode")
    found = encoder.decode_history(image, k, window, prompts, zoom=zoom)
    mark("decode")
    labelmap = empty_labelmap(image.shape)
    put_slice(labelmap, k, found.mask())
    return Segmented(
        labelmap=labelmap,
        score=float(found.iou[found.best]),
        slices=[k],
        ignored_points=len(clicks.foreground) + len(clicks.background) - len(prompts.points),
        cached=cached,
        stops={},
        crop=found.crop,
    )


def click_volume(
    image: Image,
    clicks: Clicks,
    *,
    encoder: SliceEncoder,
    window: Window,
    mark: Callable[[str], None],
    zoom: bool | None = None,
    decode_seed: SeedDecode | None = None,
    rule: StopRule | None = None,
    axis: int = 2,
    history: VolumeHistory | None = None,
) -> Segmented:
    """Segment the whole object: decode the prompted slices, then propagate in both directions.

    A ROI of one slice is a box on that slice and leaves the extent open; a ROI of several slices bounds the
    object along all axes, its box prompting the middle slice: beyond it nothing is changed. With an existing
    mask, only what the clicks change is carried to neighbouring slices. A click that continues a request in
    the history corrects what that request found on the click's slice, and only what this changes is
    propagated anew.

    Args:
        image: The image.
        clicks: Its prompts.
        encoder: Encodes and decodes slices.
        window: The intensity window.
        mark: Called with a stage's name when the stage has ended, for latencies.
        zoom: Whether a small object is encoded by itself, see `SliceEncoder`; the neighbouring slices follow
            the prompted ones.
        decode_seed: Decodes the prompts of a prompted slice; as corrections of one another by default.
        rule: When propagation stops.
        axis: The voxel axis across whose slices to propagate.
        history: Earlier answers.

    Raises:
        InputError: When nothing says where the object is, or a foreground point lies outside a ROI that
            bounds the object.
    """
    labelmap = empty_labelmap(image.shape)
    if clicks.existing is not None:
        labelmap[...] = clicks.existing
    image, clicks = turned_image(image, axis), turned_clicks(clicks, axis)
    rule = rule or StopRule()
    base = (
        image.key, window, encoder.engine.fingerprint, zoom, clicks.region, clicks.slice, rule,
        None if clicks.existing is None else mask_key(clicks.existing), tuple(sorted(clicks.boxes.items())),
        tuple((k, mask_key(rough)) for k, rough in sorted(clicks.masks.items())),
    )  # fmt: skip
    plan = _plan(image, clicks, history, base)
    cached = True
    for k, prompts in plan.seeds.items():
        cached &= encoder.prepare(image, k, window, prompts, zoom=zoom)
    mark("encode")
    decode_seed = decode_seed or (
        lambda k, prompts: encoder.decode_history(image, k, window, prompts, zoom=zoom)
    )
    found = {k: decode_seed(k, prompts) for k, prompts in plan.seeds.items()}
    mark("decode")
    crop = plan.known.crop if plan.known is not None else None
    crop = next((one.crop for one in found.values() if one.crop is not None), crop)

    decoded = {k: decoded_step(k, one) for k, one in found.items()}
    known = plan.known.volume if plan.known is not None else NOTHING
    seeds = {k: known.steps[k] for k in plan.prompted - set(decoded)} | decoded
    follower = _follower(image, clicks, seeds, encoder, window, rule, crop)
    if not decoded:
        volume = replace(known, walked=[], decoded=0)
    elif clicks.existing is not None:
        volume = correct_volume(
            clicks.existing,
            decoded,
            decode=follower.decode,
            clicks=clicks.on_slice,
            thickness=follower.thickness,
            bounds=clicks.bounds,
        )
    else:
        depth = image.shape[2]
        volume = propagate(seeds, depth=depth, follower=follower, bounds=clicks.bounds, earlier=known)
    if history is not None:
        answer = Answer(volume=volume, own=plan.own, prompted=plan.prompted, crop=crop)
        history.put(base, clicks, answer)
    _paint(turned_array(labelmap, axis), volume, clicks)
    mark("propagate")
    return Segmented(
        labelmap=labelmap,
        score=volume.iou,
        slices=sorted(plan.prompted),
        ignored_points=0,
        cached=cached,
        stops=dict(volume.stops),
        crop=crop,
        axis=axis,
        walked=volume.walked,
        decoded=volume.decoded + len(decoded),
    )


def _paint(labelmap: NDArray[np.uint8], volume: Volume, clicks: Clicks) -> None:
    """Write a volume into an (I, J, K) label map, in place; only into the ROI where one bounds the object."""
    if clicks.region is None or clicks.bounds is None:
        volume.paint(labelmap)
        return
    within = clicks.region.voxels
    painted = volume.paint(labelmap.copy(order="K"))
    labelmap[within] = painted[within]


def _follower(
    image: Image,
    clicks: Clicks,
    seeds: Mapping[int, Step],
    encoder: SliceEncoder,
    window: Window,
    rule: StopRule,
    crop: Crop | None,
) -> Follower:
    """Follows the object by the engine's memory where it has one, else from neighbour to neighbour.

    Memory sees whole slices, as it has learned to; what prompts a neighbour is zoomed as the seed was.
    """
    engine = encoder.engine

    def decode(k: int, prompts: Sequence[Prompts]) -> list[Candidates]:
        return encoder.decode(image, k, window, prompts, zoom=crop is not None)

    def track(path: range, seed: Step) -> Iterator[tuple[int, Candidates]]:
        assert isinstance(engine, VideoEngine)
        whole = (slice(0, image.shape[1]), slice(0, image.shape[0]))
        return engine.track(
            path,
            seeds={k: step.mask_on(whole) for k, step in (*seeds.items(), (seed.k, seed)) if step.area},
            embedding=lambda k: encoder.embedding(image, k, window)[0],
            clicks=clicks.on_slice,
            length=image.shape[2],
        )

    return Follower(
        size=(image.shape[1], image.shape[0]),
        decode=decode,
        values=lambda k: encoder.slice_values(image, k, window),
        clicks=clicks.on_slice,
        thickness=slice_distance(image.affine),
        rule=rule,
        track=track if isinstance(engine, VideoEngine) else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Prompts to decode, by slice; the answer that they continue; and what `Answer` says of the result."""

    seeds: dict[int, Prompts]
    known: Answer | None
    own: frozenset[int]
    prompted: frozenset[int]


def _plan(image: Image, clicks: Clicks, history: VolumeHistory | None, base: Hashable) -> _Plan:
    seeds = _seeds(image, clicks)
    known = history.get(base, clicks) if history is not None else None
    if known is not None:
        return _Plan(seeds={}, known=known, own=known.own, prompted=known.prompted)
    before = history.before(base, clicks) if history is not None and clicks.existing is None else None
    if before is None:
        return _Plan(seeds=seeds, known=None, own=frozenset(seeds), prompted=frozenset(seeds))
    known, k = before
    held = known.volume.steps.get(k)
    if (k not in known.own or k not in seeds) and held is not None and held.area:
        shown = mask_logits(held.mask_on((slice(0, image.shape[1]), slice(0, image.shape[0]))))
        fresh = {k: replace(clicks.on_slice(k), mask_logits=shown)}
        return _Plan(seeds=fresh, known=known, own=known.own, prompted=known.prompted | {k})
    fresh = {k: seeds[k]} if k in seeds else {}
    return _Plan(seeds=fresh, known=known, own=known.own | set(fresh), prompted=known.prompted | set(fresh))


def _seeds(image: Image, clicks: Clicks) -> dict[int, Prompts]:
    """The prompts of each slice that says where the object is."""
    region = clicks.region
    chosen: set[int] = {int(p[2]) for p in clicks.foreground} | {*clicks.boxes, *clicks.masks}
    if clicks.existing is not None:
        bounds = clicks.bounds
        chosen |= {
            k
            for k in clicks.slices_with_points()
            if clicks.existing[:, :, k].any() and (bounds is None or k in bounds)
        }
    boxed: int | None = None
    if region is not None:
        _check_bounds(clicks, region)
    if region is not None and not clicks.boxes:
        inside = [k for k in sorted(chosen) if k in region.slices]
        middle = (region.low[2] + region.high[2]) // 2
        boxed = clicks.slice if clicks.slice is not None and clicks.slice in region.slices else middle
        if inside and boxed not in inside and len(region.slices) > 1:
            boxed = min(inside, key=lambda k: abs(k - middle))
        chosen.add(boxed)
    if not chosen:
        raise InputError(
            "foreground",
            [],
            "no slice has a foreground point, a box, a lasso, or a click on the mask sent along; add one",
        )
    return {
        k: _on_slice(clicks, k, region.box if region is not None and k == boxed else None)
        for k in sorted(chosen)
    }


def _check_bounds(clicks: Clicks, region: Region) -> None:
    """Refuse a point, or a prompted slice, that a ROI of several slices leaves out."""
    if len(region.slices) == 1:
        return
    for point in clicks.foreground.tolist():
        if not all(low <= at <= high for low, at, high in zip(region.low, point, region.high, strict=True)):
            remedy = "the point lies outside the roi, which bounds the object; move it, or send a larger roi"
            raise InputError("foreground", point, remedy)
    for k in (*clicks.boxes, *clicks.masks):
        if k not in region.slices:
            raise InputError(
                "roi",
                region.bounds,
                f"a box or mask on slice {k} lies outside the roi's slices {region.low[2]} to "
                f"{region.high[2]}, which bound the object; send a larger roi",
            )
