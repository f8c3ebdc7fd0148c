"""How an image encoder is run: as it is, with fused attention, in bfloat16, compiled, or as a graph."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from sam_infer.engines.attention import fuse
from sam_infer.errors import InputError

#: (B, 3, side, side) float32 -> (B, C, side / 16, side / 16) float32, from one thread at a time.
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run an encoder.

    Args:
        name: What a project file calls it.
        differs: Marks the fingerprint of an engine whose features it changes by more than 1e-4, so that
            embeddings of different runtimes never meet; "" for those that compute the same.
        cuda: Whether it runs on CUDA as well.
        extra: The optional dependencies it needs, as in ``pip install samloop[extra]``.
        packages: What these bring.
    """

    name: str
    differs: str = ""
    cuda: bool = False
    extra: str = ""
    packages: tuple[str, ...] = ()


_ALL = (
    Runtime(name="eager", cuda=True),
    Runtime(name="sdpa", cuda=True),
    Runtime(name="bf16", cuda=True, differs="bf16"),
    Runtime(name="compile", cuda=True),
    Runtime(name="onnx", extra="onnx", packages=("onnx", "onnxruntime")),
    Runtime(name="openvino", extra="openvino", packages=("openvino",)),
    Runtime(name="openvino-bf16", extra="openvino", packages=("openvino",), differs="openvino-bf16"),
)
_BY_NAME = {runtime.name: runtime for runtime in _ALL}
AUTO = "auto"
#: Names that a project file may give; "auto" is the fastest one that needs nothing and changes nothing.
RUNTIMES = (AUTO, *_BY_NAME)


def find_runtime(name: str, device: torch.device) -> Runtime:
    """The runtime of a name, if it can run here.

    Raises:
        InputError: When the name is unknown, or the machine or the environment lacks what it needs.
    """
    if name not in RUNTIMES:
        raise InputError("engine.runtime", name, f"choose one of {', '.join(RUNTIMES)}")
    runtime = _BY_NAME["sdpa" if name == AUTO else name]
    missing = [package for package in runtime.packages if find_spec(package) is None]
    if missing:
        remedy = f"{', '.join(missing)} is not installed; pip install 'samloop[{runtime.extra}]'"
        raise InputError("engine.runtime", name, remedy)
    if device.type != "cpu" and not runtime.cuda:
        raise InputError("engine.runtime", name, f"runs on the CPU only, and the device is {device}")
    if runtime.name.endswith("bf16") and not _has_bfloat16(device):
        lacks = f"this {device.type.upper()} has no bfloat16 arithmetic (avx512_bf16 or amx on a CPU)"
        raise InputError("engine.runtime", name, f"{lacks}; choose {AUTO}")
    if runtime.name == "compile" and device.type == "cpu" and shutil.which(_compiler()) is None:
        raise InputError("engine.runtime", name, f"needs a C++ compiler, and there is no {_compiler()}")
    return runtime


def prepare(runtime: Runtime, encoder: nn.Module, *, side: int, digest: str) -> Encode:
    """Make an encoder ready to be run; an exported graph is built here where the disk does not hold it.

    Args:
        runtime: From `find_runtime`.
        encoder: On its device, in eval mode; it is not changed, and its parameters are not copied.
        side: Side of its square input in pixels.
        digest: Of its weights; names its exported graphs.
    """
    if runtime.extra:
        from sam_infer.engines import graphs

        return graphs.prepare(runtime.name, encoder, side=side, digest=digest)
    if runtime.name == "eager":
        return encoder
    fused = fuse(encoder)
    if runtime.name == "sdpa":
        return fused
    if runtime.name == "compile":
        compiled: Encode = torch.compile(fused, dynamic=False)
        return compiled

    def in_bfloat16(pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            features: Tensor = fused(pixels)
        return features.float()

    return in_bfloat16


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))


def _compiler() -> str:
    return os.environ.get("CXX", "g++")
