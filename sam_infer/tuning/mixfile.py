"""A SAM and the classifier that prompts it, which learned together, as one file apart from the SAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sam_infer.engines.sam import SamEngine
from sam_infer.networks.classifier import CHANNELS, SIZE, ClassifierModel, build_classifier
from sam_infer.networks.classifier import THRESHOLD as PRESENCE
from sam_infer.networks.modelfile import Content, load_model, save_model
from sam_infer.prompts.activation import THRESHOLD
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.tunedfile import TunedSam, header_of, network_of

FORMAT = "samloop-sam-mix/1"
_PARTS = ("learner", "classifier")


class MixNetwork(nn.Module):
    """Both networks; each is run by itself.

    Args:
        learner: The SAM with what it learned, prompted with attention among other things.
        classifier: From `sam_infer.networks.classifier.build_classifier`.
    """

    def __init__(self, learner: SamLearner, classifier: nn.Module) -> None:
        super().__init__()
        self.learner = learner
        self.classifier = classifier

    def learned(self) -> dict[str, Tensor]:
        """What learned, by name, on the CPU: what the file holds."""
        states = (self.learner.learned(), self.classifier.state_dict())
        return {
            f"{part}.{name}": value.detach().cpu()
            for part, state in zip(_PARTS, states, strict=True)
            for name, value in state.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `learned` gave.

        Raises:
            ValueError, RuntimeError: When it is not the state of such a network.
        """
        learner, classifier = (
            {name.removeprefix(f"{part}."): v for name, v in state.items() if name.startswith(f"{part}.")}
            for part in _PARTS
        )
        self.learner.restore(learner)
        self.classifier.load_state_dict(classifier)


@dataclass(frozen=True, kw_only=True)
class MixModel:
    """A classifier and the SAM that its activation maps prompt, with everything but that SAM's base.

    Args:
        network: Both networks.
        base: Name of the base's engine.
        digest: The base's `sam_infer.engines.sam.SamEngine.digest`.
        labels: Label name to its value in label maps, in the order of the classifier's outputs.
        size: Longest side in pixels of what the classifier sees.
        channels: Features of the classifier's four stages.
        window: The window policy of its training, for the record.
        training: Figures of its training, for the record.
        threshold: Probability from which on a label counts as present.
        cam_threshold: Value of the activation map from which on a pixel prompted while it learned.
        fingerprint: First 16 hex digits of the file's sha256; "" for a model that is not in a file.
    """

    network: MixNetwork
    base: str
    digest: str
    labels: Mapping[str, int]
    size: int = SIZE
    channels: tuple[int, ...] = CHANNELS
    window: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    threshold: float = PRESENCE
    cam_threshold: float = THRESHOLD
    fingerprint: str = ""

    @cached_property
    def classifier(self) -> ClassifierModel:
        """What is on a slice, and where to look for it."""
        return ClassifierModel(
            network=self.network.classifier.eval().requires_grad_(False),
            labels=self.labels,
            size=self.size,
            channels=self.channels,
            window=self.window,
            training=self.training,
            threshold=self.threshold,
            fingerprint=self.fingerprint,
        )

    @property
    def tuned(self) -> TunedSam:
        """The SAM alone."""
        return TunedSam(
            network=self.network.learner,
            base=self.base,
            digest=self.digest,
            labels=self.labels,
            window=self.window,
            training=self.training,
            fingerprint=self.fingerprint,
        )

    def engine(self, base: SamEngine) -> SamEngine:
        """The engine that answers the classifier's prompts, run as its base is."""
        return self.tuned.engine(base)


def save_mix(path: Path | str, model: MixModel) -> str:
    """Write what a model learned to one file, atomically.

    Args:
        path: The file; its folder is made where it is missing.
        model: What to write; its fingerprint is ignored.

    Returns:
        sha256 of the file's content, hex.
    """
    extra = {
        **header_of(model.tuned),
        "channels": list(model.channels),
        "threshold": model.threshold,
        "cam_threshold": model.cam_threshold,
    }
    return save_model(path, model, kind=FORMAT, extra=extra, state=model.network.learned())


def load_mix(path: Path | str, base: SamEngine, *, device: str = "cpu") -> MixModel:
    """Read a model from its file onto the base that it belongs to.

    Args:
        path: A file of `save_mix`.
        base: The engine that holds the base.
        device: Where the classifier goes ("cpu", "cuda", "cuda:0").

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is damaged, is something else, or belongs to another base.
    """

    def make(content: Content) -> MixModel:
        channels = tuple(int(c) for c in content.header["channels"])
        classifier = build_classifier(labels=len(content.labels), channels=channels)
        network = MixNetwork(network_of(content, base), classifier)
        network.restore(content.state)
        network.classifier.to(device)
        return MixModel(
            network=network.eval(),
            base=base.name,
            digest=base.digest,
            channels=channels,
            threshold=float(content.header["threshold"]),
            cam_threshold=float(content.header["cam_threshold"]),
            **content.common(),
        )

    return load_model(path, make, kind=FORMAT, name="SAM-Mix")
