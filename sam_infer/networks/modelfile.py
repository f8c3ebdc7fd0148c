"""A published model as one file: weights as safetensors, and in the header all that serving them needs.

What every published model has in its header is here; what only one kind has is its ``extra``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from sam_infer.files import write_atomic

Model = TypeVar("Model")


class Published(Protocol):
    """What the models that are published have in common."""

    @property
    def network(self) -> nn.Module:
        """Its state is what the file holds."""

    @property
    def labels(self) -> Mapping[str, int]:
        """Label name to its value in label maps, in the order of the network's outputs."""

    @property
    def size(self) -> int:
        """Longest side in pixels of what the network sees."""

    @property
    def window(self) -> Mapping[str, Any]:
        """The window policy of its training, for the record."""

    @property
    def training(self) -> Mapping[str, Any]:
        """Figures of its training, for the record."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a file holds.

    Args:
        header: "labels", "size", "window", "training", and what the kind adds.
        state: The network's state.
        fingerprint: First 16 hex digits of the file's sha256.
    """

    header: Mapping[str, Any]
    state: dict[str, Tensor]
    fingerprint: str

    @property
    def labels(self) -> dict[str, int]:
        """Label name to value."""
        return {str(name): int(value) for name, value in self.header["labels"]}

    def common(self) -> dict[str, Any]:
        """The arguments that every kind of model takes, but for its network."""
        return {
            "labels": self.labels,
            "size": int(self.header["size"]),
            "window": self.header["window"],
            "training": self.header["training"],
            "fingerprint": self.fingerprint,
        }


def save_model(
    path: Path | str,
    model: Published,
    *,
    kind: str,
    extra: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a model to one file, atomically.

    Args:
        path: The file; its folder is made where it is missing.
        model: What to write.
        kind: Name and version of the format.
        extra: What the header holds beside what all have; plain JSON values.
        state: What of the network the file holds; None = all.

    Returns:
        sha256 of the file's content, hex.
    """
    header = {
        "labels": list(model.labels.items()),
        "size": model.size,
        "window": dict(model.window),
        "training": dict(model.training),
        **extra,
    }
    texts = {"format": kind, **{key: json.dumps(value) for key, value in header.items()}}
    kept = model.network.state_dict() if state is None else state
    tensors = {name: t.detach().cpu().contiguous() for name, t in kept.items()}
    content = safetensors_bytes(tensors, metadata=texts)
    write_atomic(Path(path), content)
    return hashlib.sha256(content).hexdigest()


def load_model(path: Path | str, make: Callable[[Content], Model], *, kind: str, name: str) -> Model:
    """Read a model from its file.

    Args:
        path: A file of `save_model`.
        make: Builds the model; what it raises about the content is told as a damaged file.
        kind: The format that the file must have.
        name: What the weights are called in errors, such as "U-Net".

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is damaged or is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path = {str(path)!r}: there are no {name} weights; train or publish first")
    remedy = "publish a model again, or put back a file from the history folder beside it"
    try:
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        with safe_open(path, framework="pt", device="cpu") as file:
            texts = dict(file.metadata() or {})
            found = texts.pop("format", None)
            if found != kind:
                raise ValueError(f"its format is {found!r}, expected {kind!r}")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        header = {key: json.loads(text) for key, text in texts.items()}
        return make(Content(header=header, state=state, fingerprint=fingerprint))
    except (SafetensorError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"path = {str(path)!r}: not a usable {name} file ({error}); {remedy}") from error
