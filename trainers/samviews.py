"""Objects of labelled cases as a promptable engine sees them: whole slices, and crops around the object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import Packed
from sam_infer.engines.framing import Framing
from sam_infer.engines.sam import SamEngine
from sam_infer.geometry import slice_image, tight_box
from sam_infer.intensity import Window
from sam_infer.prompts.masks import large_parts, parts_of
from sam_infer.prompts.simulated import jitter_box
from sam_infer.types import BoolArray, Box, Crop, FloatArray, Prompts
from sam_infer.volumes import Image
from sam_infer.zoom import choose_crop
from trainers.slicestore import choose_slices

#: Slices of a case on which a label is learned from, at most; own choice.
SLICES_PER_LABEL = 6
#: Crops of each object, where a crop gains something: those of boxes that were drawn carelessly.
CROPS = 2
#: Of `View.truth`, from above which a pixel belongs to the object.
HALF = 127
#: Greatest move of a box's side over the box, where it was drawn carelessly; own choice.
CARELESS = 0.1


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What the network makes of a slice.

    Args:
        framing: How a slice becomes its input.
        side: Side of its input in pixels.
        grid: Side of its embedding.
    """

    framing: Framing
    side: int
    grid: int

    @property
    def low(self) -> int:
        """Side of its masks."""
        return 4 * self.grid


def frame_of(engine: SamEngine) -> Frame:
    """What the network of an engine makes of a slice."""
    sam = engine.model
    grid = int(sam.prompt_encoder.image_embedding_size[0])
    return Frame(framing=engine.framing, side=int(sam.image_encoder.img_size), grid=grid)


@dataclass(frozen=True, kw_only=True)
class View:
    """One object in one view of a slice.

    Args:
        case: The case's id.
        label: Name of the object's label.
        size: (h, w) of the view in slice pixels.
        box: The object's tight box in pixels of the view; None where nothing of it is known to be there.
        truth: (S, S) uint8 on the network's grid of masks, 255 = wholly covered by the object.
        embedding: Of the encoder that stands still; None where the encoder learns.
        values: (h, w) or (h, w, 3) uint8, 255 = the window's upper end; None where the encoder stands still.
        given: Prompts in pixels of the view that are always the same; None = as a clinician gives them.
    """

    case: str
    label: str
    size: tuple[int, int]
    box: Box | None
    truth: NDArray[np.uint8]
    embedding: Packed | None = None
    values: NDArray[np.uint8] | None = None
    given: Prompts | None = None


def object_views(
    image: Image,
    labelmap: NDArray[np.integer],
    *,
    case: str,
    labels: Mapping[str, int],
    encoder: SliceEncoder,
    window: Window,
    frame: Frame,
    still: bool,
    rng: np.random.Generator,
    slices: Sequence[int] | None = None,
    limit: int = SLICES_PER_LABEL,
) -> list[View]:
    """The views of a case: of each label on some of its slices the whole slice, and crops.

    Where a label has several large parts, each of them is an object too.

    A view on which the object covers no pixel of the network's masks by half is left out: no mask shows it
    there, and no click can be drawn in it.

    Args:
        image: The image.
        labelmap: (I, J, K) label values.
        case: Its id.
        labels: Label name to value.
        encoder: The engine that is tuned, behind its caches.
        window: How the image's values become 0..1.
        frame: What the network makes of a slice.
        still: Whether the encoder stands still, so that embeddings are kept instead of pixels.
        rng: Source of the careless boxes.
        slices: Slice indices that may be learned from; None = all.
        limit: Slices on which each label is learned from, at most.
    """
    views = []
    allowed = np.arange(image.shape[2]) if slices is None else np.asarray(slices)
    encoding = encoder.engine.encoding
    assert encoding is not None
    for label, value in labels.items():
        filled = np.array([bool((labelmap[:, :, k] == value).any()) for k in allowed])
        if not filled.any():
            continue
        for n in choose_slices(filled, limit=limit, empty_share=0.0):
            k = int(allowed[n])
            for mask in _objects(slice_image(labelmap, k) == value):
                box = tight_box(mask)
                assert box is not None
                size = (mask.shape[0], mask.shape[1])
                drawn = [jitter_box(box, CARELESS, rng, size) for _ in range(CROPS)]
                crops = [choose_crop([Prompts(box=one)], size, encoding) for one in drawn]
                for crop in dict.fromkeys([None, *crops]):
                    part = mask if crop is None else mask[crop[1] : crop[3] + 1, crop[0] : crop[2] + 1]
                    seen = _seen(image, k, window, crop, encoder, still)
                    views.append(_view(part, seen, case=case, label=label, frame=frame))
    return [view for view in views if view.truth.max() > HALF]


def _objects(mask: BoolArray) -> list[BoolArray]:
    """What a clinician may mean: a label as a whole, and where it has several large parts, each of them.

    Learned as a whole alone, both kidneys of one label taught a network to draw them at the first click and
    to ignore the next ones.
    """
    if not mask.any():
        return []
    parts = list(parts_of(large_parts(mask)))
    return [mask, *(parts if len(parts) > 1 else [])]


def given_view(
    image: Image,
    k: int,
    window: Window,
    given: Prompts,
    *,
    truth: NDArray[np.bool_] | None,
    case: str,
    label: str,
    encoder: SliceEncoder,
    frame: Frame,
    still: bool,
) -> View:
    """A whole slice with prompts that are always the same, as an automatic source of prompts gives them.

    Args:
        image: The image.
        k: Slice index.
        window: How the image's values become 0..1.
        given: In slice pixels; with a mask of its own in ``mask_logits`` it cannot be learned from.
        truth: (H, W) bool; None where it is not known: then nothing may be learned from it.
        case: The case's id.
        label: Name of the object's label.
        encoder: The engine that is tuned, behind its caches.
        frame: What the network makes of a slice.
        still: Whether the encoder stands still.
    """
    pixels = slice_image(image.array, k)
    known = np.zeros((pixels.shape[0], pixels.shape[1]), bool) if truth is None else truth
    view = _view(known, _seen(image, k, window, None, encoder, still), case=case, label=label, frame=frame)
    return replace(view, given=given)


def _seen(
    image: Image, k: int, window: Window, crop: Crop | None, encoder: SliceEncoder, still: bool
) -> Packed | NDArray[np.uint8]:
    """An embedding, or the pixels that will be encoded."""
    if still:
        return encoder.packed(image, k, window, crop=crop)[0]
    values = encoder.slice_values(image, k, window, crop=crop)
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _view(
    mask: NDArray[np.bool_], seen: Packed | NDArray[np.uint8], *, case: str, label: str, frame: Frame
) -> View:
    return View(
        case=case,
        label=label,
        size=(mask.shape[0], mask.shape[1]),
        box=tight_box(mask),
        truth=low_truth(mask, frame),
        embedding=seen if isinstance(seen, Packed) else None,
        values=None if isinstance(seen, Packed) else seen,
    )


def low_truth(mask: NDArray[np.bool_], frame: Frame) -> NDArray[np.uint8]:
    """A mask on the network's grid of masks.

    Args:
        mask: (H, W) bool.
        frame: What the network makes of a slice.

    Returns:
        (S, S) uint8, 255 where a pixel is covered wholly.
    """
    whole = torch.from_numpy(mask.astype(np.float32))[None]
    share = frame.framing.padded(whole, frame.side, frame.low)[0, 0]
    return (share * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def features_of(views: Sequence[View], sam: Any, frame: Frame, device: torch.device) -> Tensor:
    """(B, C, h, w) float32 embeddings of views: as they are kept, or encoded now."""
    if views[0].embedding is not None:
        kept = [view.embedding.unpacked().features["image"] for view in views if view.embedding is not None]
        return torch.cat([one.to(device) for one in kept])
    pixels = [
        frame.framing.image(_as_float(view.values), sam, device) for view in views if view.values is not None
    ]
    out: Tensor = sam.image_encoder(torch.cat(pixels))
    return out


def _as_float(values: NDArray[np.uint8]) -> FloatArray:
    return values.astype(np.float32) / 255.0


def view_weights(views: Sequence[View]) -> Tensor:
    """How often each view is drawn, (n,) float64: every label the same share, in it every case the same."""
    groups: dict[tuple[str, str], int] = {}
    for view in views:
        groups[view.label, view.case] = groups.get((view.label, view.case), 0) + 1
    cases: dict[str, int] = {}
    for label, _ in groups:
        cases[label] = cases.get(label, 0) + 1
    shares = [1.0 / (groups[v.label, v.case] * cases[v.label]) for v in views]
    return torch.tensor(shares, dtype=torch.float64) / len(cases)
