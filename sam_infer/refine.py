"""A network's masks, refined by a promptable engine: each becomes a prompt, and the answer is asked again.

Keuth et al., SAM Carries the Burden, arXiv:2411.12602: a box first, then the mask that it gave together with
the seeds of all classes (`KEUTH`); `sam_infer.prompts.masks` makes both. They take SAM's single-mask token in
both passes and hand on its 256 x 256 logits as they are. Engines here answer as their checkpoints' authors
have them do, and the best candidate by predicted IoU is taken: that is the single-mask token of SAM and SAM 2
in both passes of `KEUTH`, one of three for a lone positive point (``first="positive"``), and always one of
three for SAM-Med2D. Logits are handed on at the slice's own resolution, cut to what the engine takes.

Their classes may overlap and ours exclude each other, so `labelled` gives a pixel to the highest logit; their
filter is none, and `RefineLimits` is off unless asked for. Both are this project's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import put_slice, slice_image
from sam_infer.intensity import Window
from sam_infer.overlap import dice
from sam_infer.prompts.masks import Keep, MaskPrompt, Seed, dilated, mask_prompts, parts_of
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts
from sam_infer.uncertainty import as_bytes, binary_entropy
from sam_infer.volumes import Image, empty_labelmap

#: "points" = the positive seed and the negative ones, "positive" = the positive seed alone.
First = Literal["box", "points", "positive"]
#: As `First`; the mask of the first pass goes along. "none" = there is no second pass.
Second = Literal["none", "box", "points", "positive"]
#: Decodes prompts on one slice, all in one call.
Decode = Callable[[Sequence[Prompts]], list[Candidates]]
#: The prompt of one object, the logits that it gave, and their predicted IoU.
_Answer = tuple[MaskPrompt, FloatArray, float]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a mask prompts its refinement with.

    Args:
        first: Prompt of the first pass.
        second: Prompt of the second pass, beside the first one's mask.
        seed: Where positive seeds lie.
        dilation: Width in pixels of the square by which masks are widened before they become prompts; 0 is
            what the published results were made with, 8 what the paper describes.
        keep: Which components of a label are kept when it is cleaned, and whether each of them is an object
            that is prompted by itself.
    """

    first: First = "box"
    second: Second = "points"
    seed: Seed = "centroid"
    dilation: int = 0
    keep: Keep = "best"

    def __post_init__(self) -> None:
        for name, kind in (("first", First), ("second", Second), ("seed", Seed), ("keep", Keep)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}: choose one of {', '.join(get_args(kind))}"
                )
        if self.dilation < 0:
            raise ValueError(f"dilation = {self.dilation}: must be 0 or more, in pixels")


#: The published setting.
KEUTH = Scheme(first="box", second="points")


@dataclass(frozen=True, kw_only=True)
class RefineLimits:
    """Which answers are not believed: their class stays empty on that slice. None by default.

    Args:
        iou: Least predicted IoU, 0 to 1.
        agreement: Least Dice with the mask that prompted, 0 to 1.
    """

    iou: float = 0.0
    agreement: float = 0.0

    def passed(self, one: Refined) -> bool:
        """Whether an answer is good enough."""
        return one.iou >= self.iou and one.agreement >= self.agreement


@dataclass(frozen=True, kw_only=True)
class Refined:
    """One refined mask.

    Args:
        mask: (H, W) bool.
        logits: (H, W) float32 of the last pass.
        iou: Predicted IoU of the last pass, 0 to 1; of several parts the mean, each weighing what it covers.
        prompts: What the given mask prompted with, of each of its parts.
        agreement: Dice with the given mask.
    """

    mask: BoolArray
    logits: FloatArray
    iou: float
    prompts: tuple[MaskPrompt, ...]
    agreement: float


def refine_slice(
    masks: Mapping[int, BoolArray], decode: Decode, scheme: Scheme = KEUTH
) -> dict[int, Refined]:
    """Refine the masks of one slice; all of them in one call of the engine a pass.

    Args:
        masks: (H, W) bool by the label's value, clean and not widened (`Scheme.dilation` does that).
        decode: The engine on this slice.
        scheme: The prompts.

    Returns:
        By value. Masks that are empty are absent, and so are those without a pixel of their own, which give
        no seed: the authors keep such a mask as it is and do not ask SAM.
    """
    objects = [
        (value, dilated(part, scheme.dilation))
        for value, mask in masks.items()
        for part in (parts_of(mask) if scheme.keep == "parts" else [mask])
    ]
    prompts = {
        number: prompt
        for number, prompt in mask_prompts(dict(enumerate(m for _, m in objects)), seed=scheme.seed).items()
        if prompt.positive is not None
    }
    if not prompts:
        return {}
    given = list(prompts.values())
    found = _best(decode([_prompts(one, scheme.first) for one in given]))
    if scheme.second != "none":
        again = [
            replace(_prompts(one, scheme.second), mask_logits=logits)
            for one, (logits, _) in zip(given, found, strict=True)
        ]
        found = _best(decode(again))
    answers: dict[int, list[_Answer]] = {}
    for (number, prompt), (logits, iou) in zip(prompts.items(), found, strict=True):
        answers.setdefault(objects[number][0], []).append((prompt, logits, iou))
    return {value: _united(parts, masks[value]) for value, parts in answers.items()}


def _united(parts: Sequence[_Answer], mask: BoolArray) -> Refined:
    """The answers to the parts of one mask together."""
    logits = np.max([found for _, found, _ in parts], axis=0)
    covered = [max(1, np.count_nonzero(found > 0)) for _, found, _ in parts]
    return Refined(
        mask=logits > 0,
        logits=logits,
        iou=float(np.average([iou for _, _, iou in parts], weights=covered)),
        prompts=tuple(prompt for prompt, _, _ in parts),
        agreement=dice(logits > 0, mask),
    )


def labelled(
    refined: Mapping[int, Refined], kept: Mapping[int, BoolArray], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """One label a pixel: where refined masks overlap, that of the highest logit.

    Args:
        refined: By value.
        kept: (H, W) bool by value: masks that are kept as they are. They go over refined ones, which would
            otherwise cover all of them: none has a pixel of its own.
        size: (H, W).

    Returns:
        (H, W) uint8, 0 where there is no mask.
    """
    out = np.zeros(size, np.uint8)
    highest = np.zeros(size, np.float32)
    for value, one in refined.items():
        won = one.mask & (one.logits > highest)
        out[won], highest[won] = value, one.logits[won]
    for value, mask in kept.items():
        out[mask] = value
    return out


@dataclass(frozen=True, kw_only=True)
class RefinedLabel:
    """What became of one label of a volume.

    Args:
        slices: The answer of each prompted slice, without its arrays.
        dropped: Slices whose answer was not believed (`RefineLimits`).
        kept: Slices whose mask was kept, having no pixel of its own.
    """

    slices: dict[int, Answered] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """Mean predicted IoU over the prompted slices; None where no slice was prompted."""
        return float(np.mean([one.iou for one in self.slices.values()])) if self.slices else None


@dataclass(frozen=True, kw_only=True)
class Answered:
    """`Refined` without its arrays."""

    iou: float
    prompts: tuple[MaskPrompt, ...]
    agreement: float


@dataclass(frozen=True, kw_only=True)
class RefinedVolume:
    """A refined label map.

    Args:
        labelmap: (I, J, K) uint8.
        labels: What became of each label of the cleaned map, by value.
        uncertainty: (I, J, K) uint8, the binary entropy of the most doubtful refined mask at each voxel, 255
            = 1 bit, 0 on slices that were not refined; None where it was not asked for.
    """

    labelmap: NDArray[np.uint8]
    labels: dict[int, RefinedLabel]
    uncertainty: NDArray[np.uint8] | None = None


def refine_volume(
    image: Image,
    masks: NDArray[np.uint8],
    *,
    encoder: SliceEncoder,
    window: Window,
    scheme: Scheme = KEUTH,
    limits: RefineLimits | None = None,
    only: Collection[int] | None = None,
    uncertainty: bool = False,
) -> RefinedVolume:
    """Refine a label map slice by slice, on each slice that holds something.

    The authors work on single images; slices by themselves, each prompted by what the map has there, are this
    project's own choice. Engines see whole slices, as theirs does.

    Args:
        image: The image.
        masks: (I, J, K) uint8, cleaned (`sam_infer.prompts.masks.cleaned_labelmap`).
        encoder: The engine behind its caches.
        window: How the image's values become 0..1.
        scheme: The prompts.
        limits: Which answers are not believed; None = all are.
        only: Labels to answer, by value; None = all. The others on their slices still give negative seeds
            and compete for pixels, so that the answer is what it is without ``only``.
        uncertainty: Make the uncertainty map.
    """
    limits = limits or RefineLimits()
    out = empty_labelmap(image.shape)
    doubt = empty_labelmap(image.shape) if uncertainty else None
    labels: dict[int, RefinedLabel] = {}
    for k in range(image.shape[2]):
        current = slice_image(masks, k)
        values = (np.flatnonzero(np.bincount(current.ravel(), minlength=1)[1:]) + 1).tolist()
        wanted = [value for value in values if only is None or value in only]
        if not wanted:
            continue
        here = {value: current == value for value in values}

        def decode(prompts: Sequence[Prompts], k: int = k) -> list[Candidates]:
            return encoder.decode(image, k, window, prompts)

        refined = refine_slice(here, decode, scheme)
        believed = {value: one for value, one in refined.items() if limits.passed(one)}
        kept = {value: mask for value, mask in here.items() if value not in refined}
        answer = labelled(believed, kept, (image.shape[1], image.shape[0]))
        put_slice(out, k, np.where(np.isin(answer, wanted), answer, np.uint8(0)))
        for value in wanted:
            label = labels.setdefault(value, RefinedLabel())
            if value in kept:
                label.kept.append(k)
                continue
            one = refined[value]
            label.slices[k] = Answered(iou=one.iou, prompts=one.prompts, agreement=one.agreement)
            if value not in believed:
                label.dropped.append(k)
        asked = [refined[value].logits for value in wanted if value in refined]
        if doubt is not None and asked:
            put_slice(doubt, k, as_bytes(np.max([binary_entropy(logits) for logits in asked], axis=0)))
    return RefinedVolume(labelmap=out, labels=labels, uncertainty=doubt)


def _prompts(prompt: MaskPrompt, use: First | Second) -> Prompts:
    if use == "box":
        return Prompts(box=prompt.box)
    positive = np.array([prompt.positive], np.float32)
    negatives = prompt.negatives[: None if use == "points" else 0]
    return Prompts(
        points=np.concatenate([positive, negatives]),
        point_labels=np.array([1] + [0] * len(negatives), np.int64),
    )


def _best(found: Sequence[Candidates]) -> list[tuple[FloatArray, float]]:
    """Logits and predicted IoU of each prompt's best candidate."""
    return [(one.logits[one.best], float(one.iou[one.best])) for one in found]
