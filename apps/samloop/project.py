"""The project file: labels, windows, engine, models, trainers; checked when it is read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from sam_infer.engines.registry import NAMES, SAMS
from sam_infer.engines.runtime import RUNTIMES
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.text.endpoint import EndpointSettings
from sam_infer.text.labeltexts import TextSettings

DEFAULT = Path(__file__).with_name("project.yaml")
MODELS = (
    "sam_click_2d",
    "sam_click_3d",
    "sam_multi",
    "sam_scribble",
    "unet",
    "sam_auto_net",
    "sam_auto_cam",
    "sam_auto_clip",
    "sam_auto_mix",
    "sam_auto_text",
    "sam_tuned",
    "pseudo_label",
)
TRAINERS = (
    "unet",
    "pseudo_label",
    "self_training",
    "mean_teacher",
    "weak_box",
    "cam_classifier",
    "sam_finetune",
    "sam_mix",
    "preference",
)
TEXT_ENCODERS = ("hashed", "clip")
STRATEGIES = ("first", "random", "uncertainty", "disagreement", "diverse")
MAX_LABELS = 254


@dataclass(frozen=True, kw_only=True)
class Project:
    """What is served.

    Args:
        name: Shown by the viewers.
        labels: Label name -> index, contiguous from 1.
        ct: Window for CT in HU; None = percentiles.
        other: Window for other volumes; None = percentiles.
        engine: Registry name of the promptable engine.
        weights: Its checkpoint file, or a folder that holds it; None = packaged, or in the cache folder.
        device: Torch device, "auto" resolved.
        runtime: How the engine's image encoder is run.
        models: Inference tasks served.
        trainers: Trainers served.
        strategies: Active learning strategies served.
        held_out: Share of the accepted cases that judge models and never train them.
        group: Regular expression that groups case ids for the split; None = each case by itself.
        image_labels: CSV file of what whole images show, for `cam_classifier` and `sam_mix`; None = there is
            none.
        tuning: Registry name of the SAM that learns where the engine is none.
        tuning_weights: Its checkpoint file or folder; None = packaged, or in the cache folder.
        clip: Folder of the CLIP model; None = the fetched one.
        text_encoder: What embeds texts, one of `TEXT_ENCODERS`.
        texts: Where texts about labels come from.
        volumes_mb: Limit of images in memory.
        embeddings_mb: Limit of slice embeddings in memory.
        embeddings_disk_mb: Limit of slice embeddings on disk; 0 = none are kept there.
        infer_workers: Inferences at once.
        encode_ahead: Whether the slices of a case in use are encoded while nobody waits.
        accept_button: Whether the OHIF viewer gets a bar that accepts what is segmented in it.
    """

    name: str
    labels: dict[str, int]
    ct: Window | None
    other: Window | None
    engine: str
    weights: Path | None
    device: str
    runtime: str
    models: tuple[str, ...]
    trainers: tuple[str, ...]
    strategies: tuple[str, ...]
    held_out: float
    group: str | None
    image_labels: Path | None
    tuning: str
    tuning_weights: Path | None
    clip: Path | None
    text_encoder: str
    texts: TextSettings
    volumes_mb: int
    embeddings_mb: int
    embeddings_disk_mb: int
    infer_workers: int
    encode_ahead: bool
    accept_button: bool

    @property
    def engine_options(self) -> dict[str, Any]:
        """How `sam_infer.engines.registry.create_engine` makes the engine, beside its name."""
        return {"weights": self.weights, "device": self.device, "runtime": self.runtime}

    @property
    def tuned(self) -> str:
        """Registry name of the SAM that learns: the engine where that is one."""
        return self.engine if self.engine in SAMS else self.tuning

    @property
    def tuned_options(self) -> dict[str, Any]:
        """How `sam_infer.engines.registry.create_engine` makes the SAM that learns, beside its name."""
        if self.tuned == self.engine:
            return self.engine_options
        return {"weights": self.tuning_weights, "device": self.device}

    @property
    def window(self) -> dict[str, dict[str, float] | None]:
        """The window policy in words and numbers, as a project file has it."""
        return {
            "ct": asdict(self.ct) if self.ct else None,
            "other": asdict(self.other) if self.other else None,
        }


def load_project(path: Path | None = None) -> Project:
    """Read a project file; what it leaves out is as in the default project.

    Raises:
        InputError: When the file cannot be read or a value cannot be used.
    """
    settings = _read(DEFAULT)
    if path is not None:
        given = _read(path)
        unknown = sorted(set(given) - set(settings))
        if unknown:
            raise InputError(
                f"{path.name}: {unknown[0]}", given[unknown[0]], f"known keys: {', '.join(settings)}"
            )
        for key, value in given.items():
            known = settings[key]
            if not isinstance(known, dict):
                settings[key] = value
                continue
            if not isinstance(value, Mapping):
                keys = ", ".join(known) or "labels to sentences"
                raise InputError(f"{path.name}: {key}", value, f"give a mapping of {keys}")
            for inner in value if key != "descriptions" else ():
                if inner not in known:
                    raise InputError(
                        f"{path.name}: {key}.{inner}", value[inner], f"known keys: {', '.join(known)}"
                    )
            settings[key] = {**known, **value}
    return _project(settings, folder=path.parent if path is not None else Path())


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what overrides a project's engine, as `override` takes it."""
    parser.add_argument("--engine", help=f"promptable engine: {', '.join(NAMES)}")
    parser.add_argument("--weights", help="checkpoint file of the engine, or a folder that holds it")
    parser.add_argument("--runtime", help=f"how its image encoder is run: {', '.join(RUNTIMES)}")


def override(
    project: Project,
    *,
    labels: str | None = None,
    engine: str | None = None,
    weights: str | None = None,
    runtime: str | None = None,
) -> Project:
    """The project with what the command line overrides; labels are comma-separated, weights a file."""
    if labels:
        project = replace(project, labels=_labels([name.strip() for name in labels.split(",")]))
    if engine:
        project = replace(project, engine=_one_of("engine", engine, NAMES))
    if weights:
        project = replace(project, weights=Path(weights).expanduser().resolve())
    if runtime:
        project = replace(project, runtime=_one_of("engine.runtime", runtime, RUNTIMES))
    return project


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("project", path.name, f"cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError("project", path.name, "must be a YAML mapping like the default project file")
    return content


def _project(settings: Mapping[str, Any], *, folder: Path) -> Project:
    engine, split, limits, window = (settings[k] for k in ("engine", "split", "limits", "window"))
    held_out = split["held_out"]
    if not isinstance(held_out, int | float) or not 0 < held_out < 1:
        raise InputError("split.held_out", held_out, "give a share between 0 and 1, such as 0.25")
    group = split["group"]
    try:
        re.compile(group or "")
    except (re.error, TypeError) as error:
        raise InputError("split.group", group, f"not a regular expression: {error}") from error
    for key, value in limits.items():
        least = 0 if key == "embeddings_disk_mb" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"limits.{key}", value, f"give a whole number, {least} or more")
    ahead, accept = settings["encode_ahead"], settings["viewer"]["accept_button"]
    for name, value in (("encode_ahead", ahead), ("viewer.accept_button", accept)):
        if not isinstance(value, bool):
            raise InputError(name, value, "give true or false")

    def path(key: str, value: object, what: str) -> Path | None:
        if not isinstance(value, str | None):
            raise InputError(key, value, f"give the path of {what}, or null")
        return (folder / Path(value).expanduser()).resolve() if value else None

    weights, tuning = engine["weights"], settings["tuning"]
    labels = _labels(settings["labels"])
    texts = settings["texts"]
    return Project(
        name=str(settings["name"]),
        labels=labels,
        ct=_window("window.ct", window["ct"]),
        other=_window("window.other", window["other"]),
        engine=_one_of("engine.name", engine["name"], NAMES),
        weights=Path(weights).expanduser() if weights else None,
        device=_device(str(engine["device"])),
        runtime=_one_of("engine.runtime", engine["runtime"], RUNTIMES),
        models=_all_of("models", settings["models"], MODELS),
        trainers=_all_of("trainers", settings["trainers"], TRAINERS),
        strategies=_all_of("strategies", settings["strategies"], STRATEGIES),
        held_out=float(held_out),
        group=group,
        image_labels=path("image_labels", settings["image_labels"], "a CSV file"),
        tuning=_one_of("tuning.engine", tuning["engine"], SAMS),
        tuning_weights=path("tuning.weights", tuning["weights"], "a checkpoint file or a folder of them"),
        clip=path("clip.weights", settings["clip"]["weights"], "a folder that holds a CLIP model"),
        text_encoder=_one_of("texts.encoder", texts["encoder"], TEXT_ENCODERS),
        texts=_texts(settings, labels, path("texts.answers", texts["answers"], "a model's folder")),
        encode_ahead=ahead,
        accept_button=accept,
        **limits,
    )


def _texts(settings: Mapping[str, Any], labels: Mapping[str, int], answers: Path | None) -> TextSettings:
    texts, descriptions = settings["texts"], settings["descriptions"]
    for label in descriptions if isinstance(descriptions, Mapping) else ():
        _one_of("descriptions", label, tuple(labels))
    endpoint = texts["endpoint"]
    if endpoint is not None:
        known = {field.name for field in fields(EndpointSettings)}
        if not isinstance(endpoint, Mapping) or not {"url", "model"} <= set(endpoint) <= known:
            raise InputError("texts.endpoint", endpoint, "give {url: ..., model: ..., key_variable: ...}")
        endpoint = EndpointSettings(**endpoint)
    questions = texts["questions"]
    return TextSettings(
        descriptions=descriptions,
        source=texts["source"],
        endpoint=endpoint,
        answers=answers,
        questions=tuple(questions) if isinstance(questions, list) else questions,
    )


def _labels(names: object) -> dict[str, int]:
    remedy = "give distinct names in the order of their indices from 1"
    if isinstance(names, Mapping):
        ordered = sorted(names.items(), key=lambda item: item[1])
        if [index for _, index in ordered] != list(range(1, len(ordered) + 1)):
            raise InputError("labels", dict(names), f"indices must run from 1 without holes; {remedy}")
        names = [name for name, _ in ordered]
    if not isinstance(names, list) or not names or len(names) > MAX_LABELS:
        raise InputError("labels", names, f"{remedy}, 1 to {MAX_LABELS} of them")
    for name in names:
        if not isinstance(name, str) or not name.strip() or name == "background":
            raise InputError("labels", name, f"{remedy}; none may be empty or 'background'")
    if len(set(names)) != len(names):
        raise InputError("labels", names, remedy)
    return {name: index for index, name in enumerate(names, start=1)}


def _window(name: str, value: object) -> Window | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or set(value) != {"level", "width"}:
        raise InputError(name, value, "give {level: L, width: W} or null")
    return Window(level=float(value["level"]), width=float(value["width"]))


def _one_of(name: str, value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(name, value, f"choose one of {', '.join(known)}")
    return str(value)


def _all_of(name: str, values: object, known: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise InputError(name, values, f"give a list of {', '.join(known)}")
    return tuple(_one_of(name, value, known) for value in values)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("engine.device", name, "there is no CUDA device here; choose cpu or auto")
    return name
