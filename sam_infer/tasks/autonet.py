"""`sam_auto_net`: the U-Net's prediction, cleaned, prompts SAM in place of a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.networks.unet import UnetModel
from sam_infer.overlap import dice
from sam_infer.prompts.masks import (
    Keep,
    MaskPrompt,
    Seed,
    VolumePrompt,
    cleaned_labelmap,
    volume_prompts,
)
from sam_infer.prompts.request import parse_flag, parse_names, parse_number
from sam_infer.refine import (
    First,
    RefinedLabel,
    RefinedVolume,
    RefineLimits,
    Scheme,
    Second,
    refine_volume,
)
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.published import PublishedTask
from sam_infer.tasks.reply import LabelmapFile, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.tasks.unet import UnetInfer
from sam_infer.uncertainty import mean_by_label

#: Widest dilation that a client may ask for, in pixels: twice the widest that its authors searched.
MAX_DILATION = 32


class AutoNetInfer(PublishedTask[UnetModel]):
    """Masks of the project's labels without a prompt from anyone (Keuth et al., arXiv:2411.12602).

    The published U-Net labels the image; of each label one component is kept (or each large one, as an object
    of its own); its box and seeds prompt SAM on each of its slices, twice. Where the U-Net shows nothing of a
    label, SAM is not asked for it.

    Request: ``image`` (path), ``labels`` or ``label`` (names to answer; all by default), ``first_prompt``,
    ``second_prompt``, ``seed_point``, ``components`` and ``dilation`` (see `sam_infer.refine.Scheme`),
    ``min_iou`` and ``min_agreement`` (see `sam_infer.refine.RefineLimits`), ``output_uncertainty``,
    ``window_level``, ``window_width``, ``result_extension``, ``result_compress``, ``result_region``.

    Args:
        unet: The task that serves the U-Net.
        encoder: The engine behind its caches.
        library: Reads images.
        labels: The project's labels, name to value.
    """

    def __init__(
        self, *, unet: UnetInfer, encoder: SliceEncoder, library: ImageLibrary, labels: Mapping[str, int]
    ) -> None:
        defaults = Scheme()
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description=f"The U-Net's prediction prompts {encoder.engine.name}",
            config={
                "first_prompt": _choices(First, defaults.first),
                "second_prompt": _choices(Second, defaults.second),
                "seed_point": _choices(Seed, defaults.seed),
                "components": _choices(Keep, defaults.keep),
                "dilation": defaults.dilation,
                "min_iou": 0,
                "min_agreement": 0,
                "window_level": "",
                "window_width": "",
            },
        )
        self._unet = unet
        self._encoder = encoder
        self._library = library
        self._labels = dict(labels)

    def current(self) -> tuple[UnetModel | None, str]:
        """The published U-Net and "", or None and what to do."""
        return self._unet.current()

    def fingerprint(self) -> str:
        """Of the published U-Net and of the engine.

        Raises:
            InputError: (409) While no U-Net is published for the project's labels.
        """
        return f"{self.published('sam_auto_net').fingerprint} {self._encoder.engine.fingerprint}"

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Returns:
            The label map, and: label_names (name to value, the classes present); score, the mean predicted
            IoU; objects, by label: its score, its agreement (Dice of SAM's mask and the U-Net's, cleaned),
            its slices, region and seed of the U-Net's mask in voxels, and by slice the prompts of its
            components in slice pixels; missing, by label why there is none; uncertainty (mean of each class
            present, 0..1) where it was asked for.

        Raises:
            InputError: (409) While no U-Net is published for the project's labels; (400) for a parameter.
        """
        watch = Stopwatch()
        model = self.published("sam_auto_net")
        scheme, limits = parse_scheme(request), parse_limits(request)
        wanted = parse_names(request, self._labels)
        uncertain = parse_flag("output_uncertainty", request.get("output_uncertainty"))
        image = self._library.read(request["image"], transient=bool(request.get("transient")))
        window = self._library.window_for(image, request)
        watch.mark("load")
        prediction = model.predict_volume(image, window, certainty=True)
        masks = cleaned_labelmap(prediction.labelmap, prediction.certainty, keep=scheme.keep)
        watch.mark("predict")
        found = refine_volume(
            image,
            masks,
            encoder=self._encoder,
            window=window,
            scheme=scheme,
            limits=limits,
            only=wanted.values(),
            uncertainty=uncertain,
        )
        watch.mark("refine")
        report = self._report(found, masks, wanted, scheme.seed)
        labelmap, names = numbered(found.labelmap, self._labels, request)
        file, facts = make_reply(labelmap, image, request, uncertainty=found.uncertainty)
        if found.uncertainty is not None:
            facts["uncertainty"] = mean_by_label(found.uncertainty, labelmap, names)
        watch.mark("write")
        return file, {
            "label_names": names,
            **facts,
            **report,
            "model": {
                "name": "unet",
                "fingerprint": model.fingerprint,
                "round": model.training.get("round"),
            },
            "engine": self._encoder.engine.name,
            "window": {"level": window.level, "width": window.width},
            "latencies": watch.total(),
        }

    def _report(
        self, found: RefinedVolume, masks: NDArray[np.uint8], wanted: Mapping[str, int], seed: Seed
    ) -> dict[str, Any]:
        seeds = volume_prompts(masks, seed=seed)
        scores = [one.score for one in found.labels.values() if one.score is not None]
        return {
            "score": round(float(np.mean(scores)), 4) if scores else None,
            "objects": {
                name: {
                    **_told(found.labels[value], seeds[value]),
                    "agreement": round(dice(found.labelmap == value, masks == value), 4),
                }
                for name, value in wanted.items()
                if value in found.labels
            },
            "missing": {
                name: f"the U-Net shows nothing of {name} in this image, so nothing was prompted for it; use "
                "a model that takes clicks"
                for name, value in wanted.items()
                if value not in found.labels
            },
        }


def parse_scheme(request: Mapping[str, Any]) -> Scheme:
    """``first_prompt``, ``second_prompt``, ``seed_point``, ``components`` and ``dilation`` (pixels).

    All may be left out.

    Raises:
        InputError: When one is something else.
    """
    defaults = Scheme()
    width = parse_number("dilation", request.get("dilation"), defaults.dilation, MAX_DILATION)
    if width != int(width):
        raise InputError("dilation", width, f"send a whole number of pixels, 0 to {MAX_DILATION}")
    return Scheme(
        first=_chosen("first_prompt", request, First, defaults.first),
        second=_chosen("second_prompt", request, Second, defaults.second),
        seed=_chosen("seed_point", request, Seed, defaults.seed),
        dilation=int(width),
        keep=_chosen("components", request, Keep, defaults.keep),
    )


def parse_limits(request: Mapping[str, Any]) -> RefineLimits:
    """``min_iou`` and ``min_agreement``, 0 to 1; 0, the default, lets every answer pass.

    Raises:
        InputError: When one is something else.
    """
    return RefineLimits(
        iou=parse_number("min_iou", request.get("min_iou"), 0, 1),
        agreement=parse_number("min_agreement", request.get("min_agreement"), 0, 1),
    )


def _told(label: RefinedLabel, seed: VolumePrompt) -> dict[str, Any]:
    """What became of a label, as JSON."""
    score = label.score
    return {
        "score": None if score is None else round(score, 4),
        "slices": len(label.slices),
        "region": {"low": list(seed.region.low), "high": list(seed.region.high)},
        "seed": list(seed.positive),
        "dropped": label.dropped,
        "kept": label.kept,
        "prompts": {str(k): [_prompt(p) for p in one.prompts] for k, one in label.slices.items()},
    }


def _prompt(prompt: MaskPrompt) -> dict[str, Any]:
    return {
        "box": list(prompt.box),
        "positive": list(prompt.positive or ()),
        "negatives": prompt.negatives.tolist(),
    }


def _choices(kind: Any, default: str) -> list[str]:
    """The values of a Literal, the default first, as viewers list them."""
    return [default, *(value for value in get_args(kind) if value != default)]


def _chosen(name: str, request: Mapping[str, Any], kind: Any, default: str) -> Any:
    value = request.get(name) or default
    if value not in get_args(kind):
        raise InputError(name, value, f"choose one of {', '.join(get_args(kind))}")
    return value
