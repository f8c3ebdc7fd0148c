"""An image encoder quantized to 8 bits, for the comparison of runtimes only.

Post-training quantization (NNCF, https://github.com/openvinotoolkit/nncf) of weights and activations; their
ranges are taken from images that are not measured. samloop does not require it: ``pip install nncf==3.4.0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_infer.engines.attention import fuse
from sam_infer.engines.graphs import import_openvino
from sam_infer.types import FloatArray

#: Name of the runtime in the table.
INT8 = "openvino-int8"


class QuantizedEncoder(nn.Module):
    """In place of a SAM's image encoder.

    Args:
        sam: The ``segment_anything`` model whose encoder is quantized, on the CPU.
        images: What the ranges are taken from, each (H, W) float32 in 0..1.
    """

    def __init__(self, sam: Any, images: Sequence[FloatArray]) -> None:
        super().__init__()
        openvino = import_openvino()
        import nncf

        self.img_size: int = sam.image_encoder.img_size
        example = torch.zeros(1, 3, self.img_size, self.img_size)
        with torch.no_grad():
            traced = torch.jit.trace(fuse(sam.image_encoder), example, check_trace=False)
        graph = openvino.convert_model(traced, input=list(example.shape))
        pixels = nncf.Dataset([_pixels(sam, image) for image in images])
        quantized = nncf.quantize(
            graph, pixels, subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER
        )
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        self._request = openvino.Core().compile_model(quantized, "CPU", settings).create_infer_request()

    def forward(self, pixels: Tensor) -> Tensor:
        """(1, 3, side, side) float32 to (1, C, side / stride, side / stride) float32."""
        return torch.from_numpy(np.array(self._request.infer([pixels.numpy()])[0]))


def _pixels(sam: Any, image: FloatArray) -> np.ndarray:
    """(1, 3, side, side) float32: the image as ``SamPredictor.set_image`` gives it to the encoder."""
    from segment_anything.utils.transforms import ResizeLongestSide

    rgb = np.repeat(np.rint(image * 255).astype(np.uint8)[..., None], 3, axis=-1)
    resized = torch.as_tensor(ResizeLongestSide(sam.image_encoder.img_size).apply_image(rgb)).permute(
        2, 0, 1
    )[None]
    pixels: np.ndarray = sam.preprocess(resized.contiguous()).numpy()
    return pixels
