"""How a slice becomes the input of a SAM network, and the network's masks become masks of the slice.

Networks of the same architecture were trained with different framings; a checkpoint answers well only with
its own. The three known ones:

- `SAM`: Kirillov et al., Segment Anything, arXiv:2304.02643; the ``SamPredictor`` of its authors.
- `MEDSAM`: Ma et al., Segment Anything in Medical Images, arXiv:2304.12306; ``MedSAM_Inference.py``.
- `SAM_MED2D`: Cheng et al., SAM-Med2D, arXiv:2308.16184; ``predictor_sammed.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sam_infer.types import FloatArray, Prompts

_NEAR_CERTAIN = 1e-6


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What a checkpoint expects around its network.

    Args:
        keep_aspect: The longest side fills the input and the rest is padded with zeros; otherwise each axis
            is stretched to fill it.
        resample: How pixels are resampled to the input.
        normalise: "mean_std" subtracts the network's pixel mean and divides by its deviation; "range"
            stretches the resampled image to 0..1.
        masks: "by_prompt" answers a lone point with three candidates and every other prompt with the single
            refined mask; "three" and "one" answer every prompt so.
        enlarge: What is interpolated to the slice: "logits", by way of the input's size, or "probabilities".
    """

    keep_aspect: bool = True
    resample: Literal["bilinear", "nearest", "cubic"] = "bilinear"
    normalise: Literal["mean_std", "range"] = "mean_std"
    masks: Literal["by_prompt", "three", "one"] = "by_prompt"
    enlarge: Literal["logits", "probabilities"] = "logits"

    def scaled(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """(height, width) that a slice takes up in the input, one pixel at least.

        Args:
            size: (H, W) of the slice in pixels.
            side: Side of the network's square input in pixels.
        """
        if not self.keep_aspect:
            return side, side
        from segment_anything.utils.transforms import ResizeLongestSide

        height, width = ResizeLongestSide.get_preprocess_shape(size[0], size[1], side)
        return max(1, height), max(1, width)

    def image(self, image: FloatArray, model: Any, device: torch.device) -> Tensor:
        """The network's input.

        Args:
            image: (H, W) or (H, W, 3) float32 in 0..1.
            model: The ``segment_anything.modeling.Sam``.
            device: Where the result lies.

        Returns:
            (1, 3, side, side) float32.
        """
        side = model.image_encoder.img_size
        eight = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        resized = self._resize(eight, self.scaled((image.shape[0], image.shape[1]), side))
        rgb = np.repeat(resized[..., None], 3, axis=-1) if resized.ndim == 2 else resized
        tensor = torch.as_tensor(rgb, device=device).permute(2, 0, 1)[None].float()
        if self.normalise == "range":
            low, high = tensor.min(), tensor.max()
            return (tensor - low) / (high - low).clamp(min=1e-8)
        out: Tensor = model.preprocess(tensor)
        return out

    def points(self, xy: FloatArray, size: tuple[int, int], side: int) -> NDArray[np.float64]:
        """Slice pixels (..., 2) xy to input pixels (..., 2) xy float64."""
        height, width = self.scaled(size, side)
        return xy.astype(np.float64) * (width / size[1], height / size[0])

    def boxes(self, xyxy: NDArray[Any], size: tuple[int, int], side: int) -> NDArray[np.float64]:
        """Slice boxes (N, 4) xyxy to input boxes (N, 4) xyxy float64."""
        return self.points(xyxy.reshape(-1, 2, 2), size, side).reshape(-1, 4)

    def mask_input(self, logits: Tensor, side: int, low: int) -> Tensor:
        """Slice logits to the network's mask input, padded as its image is.

        Args:
            logits: (B, H, W) float32 at the slice's own resolution.
            side: Side of the network's input in pixels.
            low: Side of the network's mask input in pixels.

        Returns:
            (B, 1, low, low) float32.
        """
        mask = logits.clamp(-20, 20)
        return self.padded(mask, side, low, beyond=float(mask.min()))

    def padded(self, values: Tensor, side: int, low: int, *, beyond: float = 0.0) -> Tensor:
        """Values of a slice's pixels on a grid over the network's input.

        Args:
            values: (B, H, W) float32 at the slice's own resolution.
            side: Side of the network's input in pixels.
            low: Side of the grid.
            beyond: What lies beyond the slice.

        Returns:
            (B, 1, low, low) float32.
        """
        scaled = self.scaled((values.shape[1], values.shape[2]), side)
        height, width = (max(1, round(s * low / side)) for s in scaled)
        small = F.interpolate(
            values[:, None], (height, width), mode="bilinear", align_corners=False, antialias=True
        )
        return F.pad(small, (0, low - width, 0, low - height), value=beyond)

    def several(self, prompt: Prompts) -> bool:
        """Whether a prompt is answered with three candidates."""
        if self.masks == "by_prompt":
            return len(prompt.points) == 1 and prompt.box is None and prompt.mask_logits is None
        return self.masks == "three"

    def native(self, low: Tensor, size: tuple[int, int], model: Any) -> Tensor:
        """The network's (B, M, low, low) logits as (B, M, H, W) float32 logits of the slice."""
        if self.enlarge == "probabilities":
            probability = F.interpolate(low.float().sigmoid(), size, mode="bilinear", align_corners=False)
            return torch.logit(probability, eps=_NEAR_CERTAIN)
        scaled = self.scaled(size, model.image_encoder.img_size)
        out: Tensor = model.postprocess_masks(low, scaled, size).float()
        return out

    def _resize(self, image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        if self.resample == "nearest":
            rows, columns = (
                np.floor(np.arange(new) * (old / new)).astype(np.intp)
                for new, old in zip(size, image.shape[:2], strict=True)
            )
            return image[rows[:, None], columns]
        if self.resample == "cubic":
            from skimage.transform import resize

            smooth = resize(image, size, order=3, preserve_range=True, anti_aliasing=True)
            return smooth.astype(np.uint8)
        from PIL import Image

        pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        return np.array(pillow)


SAM = Framing()
MEDSAM = Framing(
    keep_aspect=False, resample="cubic", normalise="range", masks="one", enlarge="probabilities"
)  # fmt: skip
SAM_MED2D = Framing(keep_aspect=False, resample="nearest", masks="three")
