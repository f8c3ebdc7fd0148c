"""What a SAM learned, as one file apart from the SAM: it names the base that it belongs to and no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_infer.engines.sam import SamEngine
from sam_infer.networks.modelfile import Content, load_model, save_model
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import Tuning

FORMAT = "samloop-tuned-sam/1"


@dataclass(frozen=True, kw_only=True)
class TunedSam:
    """A tuned SAM with everything that using it needs, but for its base.

    Args:
        network: The base with what it learned.
        base: Name of the base's engine.
        digest: The base's `sam_infer.engines.sam.SamEngine.digest`.
        labels: Label name to its value in label maps: what was learned from.
        window: The window policy of its training, for the record.
        training: Figures of its training, for the record.
        texts: Where it learned to be prompted with text: how that was embedded (`encoder`, its fingerprint)
            and, by label, what was said.
        fingerprint: First 16 hex digits of the file's sha256; "" for a model that is not in a file.
    """

    network: SamLearner
    base: str
    digest: str
    labels: Mapping[str, int] = field(default_factory=dict)
    window: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def size(self) -> int:
        """Side in pixels of what the network sees."""
        return int(self.network.sam.image_encoder.img_size)

    def engine(self, base: SamEngine) -> SamEngine:
        """The engine that answers with it, run as its base is."""
        same = self.network.tuning.encoder == "frozen"
        return base.with_model(self.network.served(), extras=self.network.extras, same_encoder=same)


def untuned(base: SamEngine, *, labels: Mapping[str, int], training: Mapping[str, Any]) -> TunedSam:
    """A base as it is, as if it had been tuned: what the first tuned model is compared with."""
    network = SamLearner(base.model, tuning=Tuning())
    return TunedSam(network=network, base=base.name, digest=base.digest, labels=labels, training=training)


def save_tuned(path: Path | str, model: TunedSam) -> str:
    """Write what a model learned to one file, atomically.

    Args:
        path: The file; its folder is made where it is missing.
        model: What to write; its fingerprint is ignored.

    Returns:
        sha256 of the file's content, hex.
    """
    return save_model(path, model, kind=FORMAT, extra=header_of(model), state=model.network.learned())


def load_tuned(path: Path | str, base: SamEngine) -> TunedSam:
    """Read a model from its file onto the base that it belongs to.

    Args:
        path: A file of `save_tuned`.
        base: The engine that holds the base.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is damaged, is something else, or belongs to another base.
    """

    def make(content: Content) -> TunedSam:
        network = network_of(content, base)
        network.restore(content.state)
        common = {name: value for name, value in content.common().items() if name != "size"}
        header = content.header
        return TunedSam(
            network=network, base=base.name, digest=base.digest, texts=header.get("texts", {}), **common
        )

    return load_model(path, make, kind=FORMAT, name="tuned SAM")


def header_of(model: TunedSam) -> dict[str, Any]:
    """What the header of a file says of a model, beside what all published models say."""
    extras = model.network.extras
    return {
        "base": model.base,
        "base_sha256": model.digest,
        "tuning": model.network.tuning.record(),
        "extras": None if extras is None else extras.record(),
        "texts": dict(model.texts),
    }


def network_of(content: Content, base: SamEngine) -> SamLearner:
    """The untrained network of a file's header.

    Raises:
        ValueError: When it belongs to another base.
    """
    header = content.header
    if header["base_sha256"] != base.digest:
        raise ValueError(
            f"it was tuned on {header['base']} with weights {header['base_sha256'][:12]}, and the engine "
            f"here is {base.name} with weights {base.digest[:12]}: serve that engine, or train again on "
            "this one"
        )
    extras = header["extras"] or {}
    return SamLearner(
        base.model,
        tuning=Tuning(**header["tuning"]),
        text=extras.get("text"),
        attention=bool(extras.get("attention")),
    )
