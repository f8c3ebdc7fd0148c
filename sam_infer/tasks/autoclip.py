"""`sam_auto_clip`: where a CLIP model looks for a label's description prompts SAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from sam_infer.autoclip import ClipLabel, ClipOptions, auto_clip
from sam_infer.clip.contrast import Contrast
from sam_infer.clip.model import ClipModel
from sam_infer.clip.regions import POINTS, REGIONS, Keep
from sam_infer.clip.saliency import SALIENCIES
from sam_infer.clip.source import ClipSource
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.parts import AutoVolume
from sam_infer.prompts.request import parse_flag, parse_names, parse_number, parse_slice, parse_zoom
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.reply import LabelmapFile, LabelmapTask, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.uncertainty import mean_by_label

#: Most points in a part, and most parts of a label, that can be asked for.
MOST = 64


class AutoClipInfer(LabelmapTask):
    """Masks of the project's labels from their descriptions alone.

    See `sam_infer.autoclip`. A map that does not depend on the text is rejected and SAM not asked.

    Request: ``image`` (path), ``labels`` or ``label`` (names to look for; all that have a description by
    default), ``saliency`` ("gradcam", "m2ib", "gscorecam"), ``region`` ("crf", "kmeans"), ``parts``
    ("largest", "large" = all but the small ones, or the number of largest ones), ``points`` (inside each
    part; 0 = its box alone), ``contrast`` (false = believe every map), ``contrast_correlation`` and
    ``contrast_iou`` (0 to 1; what is no longer believed), ``slice`` (that one only), ``zoom``,
    ``output_uncertainty``, ``window_level``, ``window_width``, ``result_extension``, ``result_compress``,
    ``result_region``.

    Args:
        clip: Where the CLIP model is.
        encoder: The engine behind its caches.
        library: Reads images.
        labels: The project's labels, name to value.
        texts: The description of each label that has one, by its name.
        contrast: When a map is not believed, unless the request says otherwise.
    """

    def __init__(
        self,
        *,
        clip: ClipSource,
        encoder: SliceEncoder,
        library: ImageLibrary,
        labels: Mapping[str, int],
        texts: Mapping[str, str],
        contrast: Contrast | None = None,
    ) -> None:
        self._contrast = contrast or Contrast()
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description=f"Descriptions of the labels prompt {encoder.engine.name} through a CLIP model",
            config={
                "saliency": list(SALIENCIES),
                "region": list(REGIONS),
                "parts": "largest",
                "points": POINTS,
                "contrast": True,
                "contrast_correlation": self._contrast.correlation,
                "contrast_iou": self._contrast.iou,
                "zoom": "auto",
                "output_uncertainty": False,
                "window_level": "",
                "window_width": "",
            },
        )
        self._clip = clip
        self._encoder = encoder
        self._library = library
        self._labels = dict(labels)
        self._texts = {name: texts[name] for name in labels if texts.get(name)}

    def is_valid(self) -> bool:
        """Always: a task without a model is listed too, without labels."""
        return True

    def info(self) -> dict[str, Any]:
        """As stock; without labels while there is nothing to run."""
        model, reason = self._clip.current()
        found = super().info()
        if model is None:
            return {**found, "labels": [], "description": f"{self.description}: {reason}"}
        return found

    def fingerprint(self) -> str:
        """Of the CLIP model, the descriptions and the engine.

        Raises:
            InputError: (409) While there is no CLIP model.
        """
        said = sorted(self._texts.items())
        return f"{self._model().fingerprint} {said} {self._encoder.engine.fingerprint}"

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Returns:
            The label map, and: label_names (name to value, the classes present); score, the mean predicted
            IoU; objects, by label: its score, and by slice the boxes in slice pixels, score, and agreement
            (Dice of SAM's mask with the parts that prompted it); rejected, by label and slice: how much the
            map looks like those for nonsense; missing, by label why there is none; texts, by label;
            uncertainty (mean of each class present, 0..1) where it was asked for.

        Raises:
            InputError: (409) While there is no CLIP model; (400) for a parameter.
        """
        watch = Stopwatch()
        model = self._model()
        names = parse_names(request, self._labels)
        options = parse_clip(request, self._contrast)
        zoom = parse_zoom(request.get("zoom"))
        uncertain = parse_flag("output_uncertainty", request.get("output_uncertainty"))
        image = self._library.read(request["image"], transient=bool(request.get("transient")))
        window = self._library.window_for(image, request)
        k = parse_slice(request.get("slice"), image.shape)
        watch.mark("load")
        found = auto_clip(
            image,
            model,
            {name: self._texts[name] for name in names if name in self._texts},
            values=self._labels,
            encoder=self._encoder,
            window=window,
            options=options if k is None else replace(options, slices=[k]),
            zoom=zoom,
            uncertainty=uncertain,
        )
        watch.mark("segment")
        labelmap, present = numbered(found.labelmap, self._labels, request)
        file, facts = make_reply(labelmap, image, request, uncertainty=found.uncertainty)
        if found.uncertainty is not None:
            facts["uncertainty"] = mean_by_label(found.uncertainty, labelmap, present)
        watch.mark("write")
        return file, {
            "label_names": present,
            **facts,
            **_report(found, names),
            "texts": {name: self._texts[name] for name in found.labels},
            "model": {"name": "clip", "fingerprint": model.fingerprint},
            "engine": self._encoder.engine.name,
            "window": {"level": window.level, "width": window.width},
            "latencies": watch.total(),
        }

    def _model(self) -> ClipModel:
        model, reason = self._clip.current()
        if model is None:
            raise InputError("model", "sam_auto_clip", reason, status=409)
        return model


def parse_clip(request: Mapping[str, Any], contrast: Contrast) -> ClipOptions:
    """``saliency``, ``region``, ``parts``, ``points`` and the ``contrast`` options; all may be left out.

    Args:
        request: The request's parameters.
        contrast: What holds where the request says nothing of it.

    Raises:
        InputError: When one is something else.
    """
    correlation, iou = (
        parse_number(name, request.get(name), default, 1)
        for name, default in (
            ("contrast_correlation", contrast.correlation),
            ("contrast_iou", contrast.iou),
        )
    )
    asked = parse_flag("contrast", request.get("contrast"), default=True)
    return ClipOptions(
        saliency=_choice(request, "saliency", tuple(SALIENCIES)),
        region=_choice(request, "region", tuple(REGIONS)),
        keep=_keep(request.get("parts")),
        points=_whole("points", request.get("points"), POINTS),
        contrast=replace(contrast, correlation=correlation, iou=iou) if asked else None,
    )


def _choice(request: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    """One of a few words; the first where nothing is said, or where all are sent back as they were listed."""
    value = request.get(name)
    if value in (None, "") or value == list(known):
        return known[0]
    if value not in known:
        raise InputError(name, value, f"choose one of {', '.join(known)}")
    return str(value)


def _keep(value: object) -> Keep:
    words = get_args(get_args(Keep)[0])
    if value in (None, ""):
        return "largest"
    if value in words:
        return value  # type: ignore[return-value]
    number = _whole("parts", value, 1)
    if not number:
        raise InputError("parts", value, f"send {', '.join(words)} or a number from 1 to {MOST}")
    return number


def _whole(name: str, value: object, default: int) -> int:
    number = parse_number(name, value, default, MOST)
    if number != int(number):
        raise InputError(name, value, f"send a whole number from 0 to {MOST}")
    return int(number)


def _report(found: AutoVolume[ClipLabel], names: Mapping[str, int]) -> dict[str, Any]:
    scores = [one.score for one in found.labels.values() if one.score is not None]
    return {
        "score": round(float(np.mean(scores)), 4) if scores else None,
        "objects": {name: _told(one) for name, one in found.labels.items() if one.slices},
        "rejected": {
            name: {
                str(k): {
                    "correlation": round(one.contrast[k].correlation, 4),
                    "iou": round(one.contrast[k].iou, 4),
                }
                for k in one.rejected
            }
            for name, one in found.labels.items()
            if one.rejected
        },
        "missing": {
            name: _missing(name, found.labels.get(name))
            for name in names
            if name not in found.labels or not found.labels[name].slices
        },
    }


def _told(label: ClipLabel) -> dict[str, Any]:
    """What became of a label, as JSON."""
    return {
        "score": None if label.score is None else round(label.score, 4),
        "slices": sorted(label.slices),
        "silent": label.silent,
        "prompts": {
            str(k): {
                **one.record(),
                **({"correlation": round(label.contrast[k].correlation, 4)} if k in label.contrast else {}),
            }
            for k, one in label.slices.items()
        },
    }


def _missing(name: str, label: ClipLabel | None) -> str:
    """Why nothing was prompted."""
    if label is None:
        return f"{name} has no description; give it one in the project file"
    if label.rejected:
        return (
            "where the CLIP model looks does not depend on the text: it looks there for nonsense too, so "
            "nothing was prompted; describe it otherwise, try another saliency, or use a model that takes "
            "clicks"
        )
    return "the saliency map shows nothing; describe it otherwise, or use a model that takes clicks"
