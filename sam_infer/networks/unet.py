"""The model that learns from accepted masks: a small 2D U-Net, its file and its predictions.

One file holds everything that serving needs: the weights as safetensors and, in the header, the labels, the
model's resolution and what it was trained on. Slices are resized so that their longest side has ``size``
pixels and padded to a square; logits are resized back, so callers see native resolution only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sam_infer.geometry import put_slice, slice_image
from sam_infer.intensity import Window
from sam_infer.networks.modelfile import Content, load_model, save_model
from sam_infer.types import FloatArray
from sam_infer.uncertainty import softmax_entropy
from sam_infer.volumes import Image, empty_labelmap

FORMAT = "samloop-unet/1"
CHANNELS = (16, 32, 64, 128, 128)
SIZE = 128
#: Slices per forward pass: bounds memory, 8 slices of 512 x 512 with 5 labels are 50 MB of logits.
BATCH = 8
#: A pixel counts for a case's confidence where background has less than this probability.
SUSPECT_BELOW = 0.95


def build_unet(*, labels: int, channels: Sequence[int] = CHANNELS) -> nn.Module:
    """An untrained network.

    Args:
        labels: Number of labels without background.
        channels: Features per level; the first level works at half resolution.

    Returns:
        A module (B, 1, S, S) float32 in 0..1 -> (B, labels + 1, S, S) logits; S a multiple of
        `multiple_of(channels)`.
    """
    from monai.networks.nets import UNet

    return UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=labels + 1,
        channels=tuple(channels),
        strides=(2,) * (len(channels) - 1),
        num_res_units=1,
    )


def multiple_of(channels: Sequence[int]) -> int:
    """The side of the network's input must be a multiple of this number of pixels."""
    return int(2 ** (len(channels) - 1))


def check_size(size: int, channels: Sequence[int] = CHANNELS) -> int:
    """The size itself, if the network can work at it: a multiple of `multiple_of`, at least twice that."""
    step = multiple_of(channels)
    if size % step or size < 2 * step:
        raise ValueError(f"size = {size!r}: must be a multiple of {step} pixels, at least {2 * step}")
    return size


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of a slice after its longest side is resized to ``size`` pixels."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_square(slices: Tensor, size: int) -> Tensor:
    """Resize slices so that the longest side has ``size`` pixels, and pad right and below with zeros.

    Args:
        slices: (n, C, H, W); float is interpolated, uint8 (label maps) takes the nearest pixel.
        size: Side of the square in pixels.

    Returns:
        (n, C, size, size) of the same type.
    """
    height, width = fitted(slices.shape[-2], slices.shape[-1], size)
    if slices.dtype == torch.uint8:
        out = F.interpolate(slices, (height, width), mode="nearest-exact")
    else:
        out = F.interpolate(slices, (height, width), mode="bilinear", antialias=True)
    return F.pad(out, (0, size - width, 0, size - height))


def from_square(logits: Tensor, height: int, width: int) -> Tensor:
    """Undo `to_square`: (n, C, S, S) float32 -> (n, C, height, width) at native resolution."""
    inner = fitted(height, width, logits.shape[-1])
    out: Tensor = F.interpolate(
        logits[..., : inner[0], : inner[1]], (height, width), mode="bilinear", align_corners=False
    )
    return out


def grey(image: NDArray) -> NDArray:
    """(H, W) of a slice; RGB (H, W, 3) becomes the mean of its channels."""
    return image.mean(axis=-1, dtype=np.float32) if image.ndim == 3 else image


def windowed_slices(image: Image, window: Window, indices: Sequence[int]) -> FloatArray:
    """The model's input: slices ``indices`` of a volume, (n, H, W) float32 in 0..1, native resolution."""
    return np.stack([window.apply(grey(slice_image(image.array, k))) for k in indices])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one case.

    Args:
        labelmap: (I, J, K) uint8, values as in the model's labels.
        confidence: 0..1, mean probability of the predicted class over the pixels where background is not
            certain (`SUSPECT_BELOW`); 1 where there is no such pixel.
        certainty: (I, J, K) uint8, the probability of each voxel's label, 255 = 1, and 0 where there is no
            label; None where it was not asked for.
        entropy: (I, J, K) uint8, the entropy of the classes over the greatest that it can be, 255 = 1; None
            where it was not asked for.
    """

    labelmap: NDArray[np.uint8]
    confidence: float
    certainty: NDArray[np.uint8] | None = None
    entropy: NDArray[np.uint8] | None = None


@dataclass(frozen=True, kw_only=True)
class UnetModel:
    """A trained U-Net with everything that using it needs. Safe to call from several threads.

    Args:
        network: From `build_unet`, in evaluation mode.
        labels: Label name to its value in label maps (1..254, gaps allowed); the network's channels follow
            the order of these entries, after background.
        size: Longest side in pixels of what the network sees.
        channels: Features per level.
        window: The window policy it was trained with, for the record.
        training: Figures of its training (round, cases, Dice, seed...), for the record.
        fingerprint: First 16 hex digits of the file's sha256; "" for a model that is not in a file.
    """

    network: nn.Module
    labels: Mapping[str, int]
    size: int = SIZE
    channels: tuple[int, ...] = CHANNELS
    window: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def predict_volume(
        self, image: Image, window: Window, *, certainty: bool = False, entropy: bool = False
    ) -> Prediction:
        """Label a whole image, a few slices at a time; no volume of probabilities is ever held.

        Args:
            image: A 2D image or a volume of any size.
            window: How its values become 0..1.
            certainty: Make `Prediction.certainty`.
            entropy: Make `Prediction.entropy`.
        """
        labelmap = empty_labelmap(image.shape)
        sure = empty_labelmap(image.shape) if certainty else None
        doubt = empty_labelmap(image.shape) if entropy else None
        values = torch.tensor([0, *self.labels.values()], dtype=torch.uint8)
        total, pixels = 0.0, 0
        for start in range(0, image.shape[2], BATCH):
            indices = range(start, min(start + BATCH, image.shape[2]))
            slices = windowed_slices(image, window, indices)
            size = slices.shape[1:]
            logits = self._logits(slices)
            inside = _content(logits, size)
            total, pixels = total + inside[0], pixels + inside[1]
            if doubt is not None:
                _put(doubt, indices, 255 * softmax_entropy(from_square(logits, *size)))
            # Where background wins everywhere it also wins between the pixels: no need to look closer.
            found = logits.argmax(dim=1).flatten(1).any(dim=1)
            native = from_square(logits[found], *size)
            winners = native.argmax(dim=1)
            holding = [k for k, holds in zip(indices, found.tolist(), strict=True) if holds]
            _put(labelmap, holding, values.to(winners.device)[winners])
            if sure is not None:
                _put(sure, holding, 255 * torch.softmax(native, dim=1).amax(dim=1) * (winners > 0))
        return Prediction(
            labelmap=labelmap,
            confidence=total / pixels if pixels else 1.0,
            certainty=sure,
            entropy=doubt,
        )

    def probabilities(self, image: Image, window: Window, k: int) -> FloatArray:
        """The probability of each label on slice ``k``.

        Returns:
            (L, H, W) float32 in the order of ``labels``, at native resolution; what is missing to 1 is the
            background's.
        """
        slices = windowed_slices(image, window, [k])
        native = from_square(self._logits(slices), *slices.shape[1:])
        out: FloatArray = torch.softmax(native, dim=1)[0, 1:].cpu().numpy()
        return out

    def confidence(self, image: Image, window: Window, *, slices: int = 16) -> float:
        """`Prediction.confidence` from at most ``slices`` evenly spaced slices: what ranking cases needs."""
        depth = image.shape[2]
        indices = np.unique(np.linspace(0, depth - 1, min(slices, depth)).round().astype(int)).tolist()
        total, pixels = 0.0, 0
        for start in range(0, len(indices), BATCH):
            batch = windowed_slices(image, window, indices[start : start + BATCH])
            inside = _content(self._logits(batch), batch.shape[1:])
            total, pixels = total + inside[0], pixels + inside[1]
        return total / pixels if pixels else 1.0

    def _logits(self, slices: FloatArray) -> Tensor:
        """(n, L + 1, S, S) float32 on the model's device."""
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(slices, np.float32))[:, None].to(self.device)
            out: Tensor = self.network(to_square(inputs, self.size)).float()
        return out


def _put(volume: NDArray[np.uint8], indices: Sequence[int], slices: Tensor) -> None:
    """Write (n, H, W) slices into an (I, J, K) volume; float values are rounded."""
    whole = slices.round().to(torch.uint8) if slices.is_floating_point() else slices
    for k, one in zip(indices, whole.cpu().numpy(), strict=True):
        put_slice(volume, k, one)


def _content(logits: Tensor, native: Sequence[int]) -> tuple[float, int]:
    """Sum of the winner's probability, and number, of the pixels that are not certain background."""
    height, width = fitted(native[0], native[1], logits.shape[-1])
    probabilities = torch.softmax(logits[..., :height, :width], dim=1)
    suspect = probabilities[:, 0] < SUSPECT_BELOW
    return float(probabilities.amax(dim=1)[suspect].sum()), int(suspect.sum())


def save_unet(path: Path | str, model: UnetModel) -> str:
    """Write a model to one file, atomically.

    Args:
        path: The file; its folder is made where it is missing.
        model: What to write; its fingerprint is ignored.

    Returns:
        sha256 of the file's content, hex.
    """
    return save_model(path, model, kind=FORMAT, extra={"channels": list(model.channels)})


def load_unet(path: Path | str, *, device: str = "cpu") -> UnetModel:
    """Read a model from its file.

    Args:
        path: A file of `save_unet`.
        device: Where the weights go ("cpu", "cuda", "cuda:0").

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is damaged or is something else.
    """

    def make(content: Content) -> UnetModel:
        channels = tuple(int(c) for c in content.header["channels"])
        network = build_unet(labels=len(content.labels), channels=channels)
        network.load_state_dict(content.state)
        return UnetModel(network=network.to(device).eval(), channels=channels, **content.common())

    return load_model(path, make, kind=FORMAT, name="U-Net")
