"""Image encoders as exported graphs: ONNX Runtime and OpenVINO on the CPU.

A graph is traced once for the weights it holds, for one image at a time, and kept on disk beside fetched
checkpoints; a graph that is there is whole.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sam_infer.engines.location import cache_folder
from sam_infer.files import sweep, sync

logger = logging.getLogger(__name__)

#: Changes when the same weights are exported to another graph.
_LAYOUT = 1
_OPSET = 18

_Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def graph_folder() -> Path:
    """The folder of exported graphs, in that of fetched checkpoints."""
    return cache_folder() / "graphs"


def prepare(name: str, encoder: nn.Module, *, side: int, digest: str) -> Callable[[Tensor], Tensor]:
    """An encoder as a graph, which is exported where the disk does not hold it; see `runtime.prepare`."""
    if name == "onnx":
        one = _onnx(_stored("onnx", "onnxruntime", encoder, side, digest, _export_onnx))
    else:
        precision = "bf16" if name.endswith("bf16") else "f32"
        one = _openvino(_stored("openvino", "openvino", encoder, side, digest, _export_openvino), precision)

    def encode(pixels: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(one(image[None].numpy())) for image in pixels])

    return encode


def _stored(
    kind: str,
    package: str,
    encoder: nn.Module,
    side: int,
    digest: str,
    export: Callable[[nn.Module, Tensor, Path], None],
) -> Path:
    """The folder of a graph; made under a temporary name beside it and moved into place."""
    parts = (digest, str(side), str(_LAYOUT), torch.__version__, version(package))
    target = graph_folder() / f"{kind}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:32]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.warning("Exporting the encoder to %s, once for these weights; this takes a minute or more", target)
    sweep(target.parent, folders=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    graph = temporary / "graph"  # unlike the folder around it, for others to read, too
    graph.mkdir()
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the shapes that a trace fixes are meant to be fixed
            export(encoder, torch.zeros(1, 3, side, side), graph)
        for file in graph.iterdir():
            sync(file)
        try:
            graph.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _export_onnx(encoder: nn.Module, example: Tensor, folder: Path) -> None:
    torch.onnx.export(
        encoder,
        (example,),
        folder / "encoder.onnx",
        dynamo=False,
        opset_version=_OPSET,
        input_names=["pixels"],
        output_names=["features"],
    )


def _onnx(folder: Path) -> _Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(folder / "encoder.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = session.run(None, {"pixels": pixels})[0]
        return out

    return run


def _export_openvino(encoder: nn.Module, example: Tensor, folder: Path) -> None:
    openvino = import_openvino()
    traced = torch.jit.trace(encoder, example, check_trace=False)
    model = openvino.convert_model(traced, input=list(example.shape))
    openvino.save_model(model, folder / "encoder.xml", compress_to_fp16=False)


def _openvino(folder: Path, precision: str) -> _Run:
    openvino = import_openvino()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # pinned threads of two processes would share one core
    }
    request = openvino.Core().compile_model(folder / "encoder.xml", "CPU", settings).create_infer_request()

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.array(request.infer([pixels])[0])

    return run


def import_openvino() -> Any:
    """OpenVINO without its telemetry, which reports every import over the network unless it is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
