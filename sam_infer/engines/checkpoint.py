"""Checkpoint files into networks: read as data only, checked, and told apart where they do not fit.

Checkpoints come from many programs and places. Nothing in one is ever run: pickles are read by torch's reader
of weights, which knows tensors and containers and refuses every other object.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sam_infer.engines.architectures import Architecture, identify
from sam_infer.errors import InputError

#: Where training programs keep the parameters within what they save.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
#: What they put before every name.
_PREFIXES = ("module.", "_orig_mod.", "sam.", "model.")
#: How torch's reader names what it refuses.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|but got <class '([\w.]+)'|unrecognized function (.+)")
_AGAIN = "get the file again: `samloop weights fetch` resumes and checks it"
#: The list of stand-ins is one for the whole process.
_reading = threading.Lock()


class _Optimizer:
    """Stands in for the optimizer that some programs pickle beside the parameters (SAM-Med2D's does)."""


def _mapping(*_: object) -> dict[Any, Any]:
    """Stands in for the kind of dictionary in which an optimizer keeps its state."""
    return {}


_STAND_INS: list[Any] = [
    (_Optimizer, "torch.optim.adam.Adam"),
    (_Optimizer, "torch.optim.adamw.AdamW"),
    (_Optimizer, "torch.optim.sgd.SGD"),
    (_mapping, "collections.defaultdict"),
    (_mapping, "builtins.dict"),
]


def load_network(weights: Path, *, architecture: Architecture, build: Callable[[], Any] | None = None) -> Any:
    """A network with the parameters of a checkpoint file, on the CPU.

    Args:
        weights: The file; see `read_state`.
        architecture: What it must hold.
        build: Makes the network; None = as the architecture says.

    Raises:
        InputError: When the file cannot be read or holds another network.
    """
    state = read_state(weights)
    found = identify(state)
    if found is not None and found != architecture.label:
        raise InputError(
            "weights",
            weights.name,
            f"holds {found}, not {architecture.label}; choose the engine that fits it",
        )
    build = build or architecture.build
    assert build is not None
    network = build()
    fill(network, state, name=weights.name, label=architecture.label)
    return network


def fill(network: Any, state: Mapping[str, Tensor], *, name: str, label: str) -> None:
    """Copy a state dict into a network, which must have exactly these parameters.

    Args:
        network: The ``torch.nn.Module``.
        state: Its parameters and buffers by name.
        name: The file's name, for messages.
        label: What the network is called, for messages.

    Raises:
        InputError: When a parameter is missing, unknown, of another shape or not finite.
    """
    wanted = network.state_dict()
    for what, keys in (("lacks", wanted.keys() - state.keys()), ("also has", state.keys() - wanted.keys())):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise InputError(
                "weights", name, f"not a checkpoint of {label}: {what} {len(keys)} parameters ({some} ...)"
            )
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise InputError(
                "weights",
                name,
                f"not a checkpoint of {label}: {key} has shape {tuple(value.shape)}, "
                f"not {tuple(wanted[key].shape)}",
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError("weights", name, f"{key} holds values that are not finite; get the file again")
    network.load_state_dict(state)


def digest_of(kind: str, weights: Path | None, model: Any) -> str:
    """SHA-256 (hex) of an engine's kind and of its checkpoint file, or of its parameters where it has none.

    Args:
        kind: What besides the parameters decides an engine's answers, with a version.
        weights: The file; None = the parameters of ``model``, a ``torch.nn.Module``, count.
        model: Not looked at where there is a file.
    """
    digest = hashlib.sha256(kind.encode())
    if weights is not None:
        with weights.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        for key, value in model.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint file, whatever device wrote it.

    Safetensors and everything that ``torch.save`` writes are read; wrappers such as ``{"model": ...}`` and
    prefixes such as ``module.`` are taken off. Where the format allows it, the tensors are views of the
    mapped file and cost no memory.

    Args:
        path: The file.

    Returns:
        Tensors on the CPU by parameter name.

    Raises:
        InputError: When the file is not a readable checkpoint; the text says what it is instead.
    """
    _refuse_what_is_no_checkpoint(path)
    try:
        content = load_file(path) if _is_safetensors(path) else _read_pickle(path)
    except InputError:
        raise
    except Exception as error:  # A damaged file makes the readers raise almost anything.
        raise InputError("weights", path.name, f"is damaged or cut off ({_line(error)}); {_AGAIN}") from error
    state = _unwrapped(content)
    if state is None:
        raise InputError("weights", path.name, f"holds no parameters: {_told(content)}")
    return state


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    if path.is_dir():
        raise InputError("weights", str(path), "is a folder; give the checkpoint file in it")
    if not path.is_file():
        raise InputError("weights", str(path), "no such file")
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        problem = "is empty"
    elif text.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer, not the file itself; run git lfs pull where it came from"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = "is a web page that was saved under this name"
    elif head.startswith(b"PK") and not zipfile.is_zipfile(path):
        problem = f"is cut off after {path.stat().st_size} bytes"
    elif head.startswith(b"PK") or head.startswith(b"\x80") or _is_safetensors(path):
        return
    else:
        problem = "is neither a PyTorch nor a safetensors file"
    raise InputError("weights", path.name, f"{problem}; {_AGAIN}")


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts as the format does: the header's length in 8 bytes, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _read_pickle(path: Path) -> Any:
    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path)
    try:
        with _reading, torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise
        raise InputError(
            "weights",
            path.name,
            f"holds Python objects ({next(filter(None, refused.groups()))}), which are never run; save its "
            "parameters alone, with torch.save(model.state_dict(), ...) or as safetensors",
        ) from error


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise InputError("weights", path.name, "is a TorchScript program; give the model's state dict")
    if "data.pkl" not in names:
        raise InputError("weights", path.name, "is a ZIP archive without a PyTorch checkpoint; unpack it")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError("weights", path.name, "was compressed again; give the file as it was published")


def _unwrapped(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return _unwrapped(content[key])
    state = {str(key): value for key, value in content.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        return None
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _told(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping of {', '.join(map(str, list(content)[:5])) or 'nothing'}"
    return f"an object of type {type(content).__name__}"


def _line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return next(iter(lines), type(error).__name__)[:160]
