"""`sam_auto_cam`: where a classifier looks for a label becomes a box, and the box prompts SAM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam_infer.autocam import CamLabel, CamOptions, auto_cam
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.networks.classifier import THRESHOLD, ClassifierModel, load_classifier
from sam_infer.parts import AutoVolume
from sam_infer.prompts.activation import THRESHOLD as CAM_THRESHOLD
from sam_infer.prompts.request import parse_flag, parse_names, parse_number, parse_zoom
from sam_infer.published import PublishedModel
from sam_infer.tasks.numbering import numbered
from sam_infer.tasks.published import PublishedTask
from sam_infer.tasks.reply import LabelmapFile, make_reply
from sam_infer.tasks.stopwatch import Stopwatch
from sam_infer.uncertainty import mean_by_label


class AutoCamInfer(PublishedTask[ClassifierModel]):
    """Masks of the project's labels without a prompt from anyone, from image-level labels alone.

    After Ward and Imran (SAM-Mix, arXiv 2412.08575); see `sam_infer.autocam`. Where the classifier says that
    a label is absent, or its activation map shows nothing, SAM is not asked for it.

    Request: ``image`` (path), ``labels`` or ``label`` (names to look for; all by default),
    ``presence_threshold`` (0 to 1; the model's own by default), ``cam_threshold`` (above 0 up to 1),
    ``cam_every_part`` (true = a box for each part of the map, not only for the one with the peak), ``zoom``,
    ``output_uncertainty``, ``window_level``, ``window_width``, ``result_extension``, ``result_compress``,
    ``result_region``.

    Args:
        path: The weights file that the training loop publishes.
        encoder: The engine behind its caches.
        library: Reads images.
        labels: The project's labels, name to value.
        device: Where the classifier runs.
        minimum: Accepted cases that a first training needs, for the description.
    """

    def __init__(
        self,
        *,
        path: Path | str,
        encoder: SliceEncoder,
        library: ImageLibrary,
        labels: Mapping[str, int],
        device: str = "cpu",
        minimum: int = 4,
    ) -> None:
        super().__init__(
            type="segmentation",
            labels=dict(labels),
            dimension=3,
            description=f"A classifier's activation maps prompt {encoder.engine.name}",
            config={
                "presence_threshold": "",
                "cam_threshold": CAM_THRESHOLD,
                "cam_every_part": False,
                "zoom": "auto",
                "output_uncertainty": False,
                "window_level": "",
                "window_width": "",
            },
        )
        self.path = Path(path)
        self._encoder = encoder
        self._library = library
        self._labels = dict(labels)
        self._published = PublishedModel(
            path,
            load=lambda file: load_classifier(file, device=device),
            labels=labels,
            train="POST /train/cam_classifier",
            minimum=minimum,
        )

    def get_path(self, validate: bool = True) -> str | None:
        """The weights file; None where it is asked to exist and does not."""
        return str(self.path) if self.path.is_file() or not validate else None

    def current(self) -> tuple[ClassifierModel | None, str]:
        """The published classifier and "", or None and what to do."""
        return self._published.current()

    def fingerprint(self) -> str:
        """Of the published classifier and of the engine.

        Raises:
            InputError: (409) While no classifier is published for the project's labels.
        """
        return f"{self.published('sam_auto_cam').fingerprint} {self._encoder.engine.fingerprint}"

    def answer(self, request: Mapping[str, Any]) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Label an image.

        Returns:
            The label map, and: label_names (name to value, the classes present); score, the mean predicted
            IoU; presence, by label: its probability, the highest of the slices; objects, by label: its score,
            the slices that were prompted, the slices on which the map shows nothing, and by slice the
            presence, boxes in slice pixels, score, and agreement (Dice of SAM's mask with the part of the map
            that prompted it); missing, by label why there is none; uncertainty (mean of each class present,
            0..1) where it was asked for.

        Raises:
            InputError: (409) While no classifier is published for the project's labels; (400) for a
                parameter.
        """
        model = self.published("sam_auto_cam")
        return answer_cam(
            request,
            model,
            encoder=self._encoder,
            library=self._library,
            options=parse_cam(request, self._labels),
            zoom=parse_zoom(request.get("zoom")),
            name="cam",
        )


def answer_cam(
    request: Mapping[str, Any],
    model: ClassifierModel,
    *,
    encoder: SliceEncoder,
    library: ImageLibrary,
    options: CamOptions,
    zoom: bool | None,
    name: str,
) -> tuple[LabelmapFile | None, dict[str, Any]]:
    """Label the image of a request from a classifier's activation maps; see `AutoCamInfer.answer`.

    Args:
        request: The image, its window, and how the reply is written.
        model: The classifier.
        encoder: The engine behind its caches.
        library: Reads images.
        options: What is prompted.
        zoom: Whether the engine looks at a crop around the boxes, see `SliceEncoder`.
        name: What the reply calls the model.
    """
    watch = Stopwatch()
    uncertain = parse_flag("output_uncertainty", request.get("output_uncertainty"))
    image = library.read(request["image"], transient=bool(request.get("transient")))
    window = library.window_for(image, request)
    watch.mark("load")
    found = auto_cam(
        image,
        model,
        encoder=encoder,
        window=window,
        options=options,
        zoom=zoom,
        uncertainty=uncertain,
    )
    watch.mark("segment")
    labelmap, names = numbered(found.labelmap, dict(model.labels), request)
    file, facts = make_reply(labelmap, image, request, uncertainty=found.uncertainty)
    if found.uncertainty is not None:
        facts["uncertainty"] = mean_by_label(found.uncertainty, labelmap, names)
    watch.mark("write")
    return file, {
        "label_names": names,
        **facts,
        **_report(found, model.threshold if options.presence is None else options.presence),
        "model": {
            "name": name,
            "fingerprint": model.fingerprint,
            "round": model.training.get("round"),
        },
        "engine": encoder.engine.name,
        "window": {"level": window.level, "width": window.width},
        "latencies": watch.total(),
    }


def parse_cam(
    request: Mapping[str, Any],
    labels: Mapping[str, int],
    *,
    threshold: float = CAM_THRESHOLD,
    attention: bool = False,
) -> CamOptions:
    """``presence_threshold``, ``cam_threshold``, ``cam_every_part`` and the labels; all may be left out.

    Args:
        request: The request's parameters.
        labels: The project's labels, name to value.
        threshold: Where ``cam_threshold`` is left out.
        attention: See `CamOptions`.

    Raises:
        InputError: When one is something else.
    """
    presence = request.get("presence_threshold")
    threshold = parse_number("cam_threshold", request.get("cam_threshold"), threshold, 1)
    if threshold == 0:
        raise InputError("cam_threshold", threshold, "send a number above 0, up to 1")
    return CamOptions(
        presence=None
        if presence in (None, "")
        else parse_number("presence_threshold", presence, THRESHOLD, 1),
        threshold=threshold,
        every=parse_flag("cam_every_part", request.get("cam_every_part")),
        labels=parse_names(request, labels),
        attention=attention,
    )


def _report(found: AutoVolume[CamLabel], threshold: float) -> dict[str, Any]:
    scores = [one.score for one in found.labels.values() if one.score is not None]
    return {
        "score": round(float(np.mean(scores)), 4) if scores else None,
        "presence": {name: round(float(one.presence.max()), 4) for name, one in found.labels.items()},
        "objects": {name: _told(one) for name, one in found.labels.items() if one.slices},
        "missing": {
            name: _missing(name, one, threshold) for name, one in found.labels.items() if not one.slices
        },
    }


def _told(label: CamLabel) -> dict[str, Any]:
    """What became of a label, as JSON."""
    return {
        "score": None if label.score is None else round(label.score, 4),
        "slices": sorted(label.slices),
        "silent": label.silent,
        "prompts": {
            str(k): {"presence": round(float(label.presence[k]), 4), **one.record()}
            for k, one in label.slices.items()
        },
    }


def _missing(name: str, label: CamLabel, threshold: float) -> str:
    """Why nothing was prompted."""
    if label.silent:
        return (
            f"{name} is present, but the activation map shows nothing of where, so nothing was prompted for "
            "it; use a model that takes clicks"
        )
    return (
        f"absent: its probability, {float(label.presence.max()):.2f}, is below {threshold:g}; lower "
        "presence_threshold, or use a model that takes clicks"
    )
