"""What is on a slice, learned from image-level labels alone, and where the classifier looks for it.

Ward and Imran (SAM-Mix, arXiv 2412.08575, figure 1) prompt SAM from the class activation map of a classifier
that ends in a coarse grid of about 8 x 8 maps and global average pooling. Their "ResNet-38" is not a depth
that is known elsewhere, so the network here is this project's own small one: four residual stages of one
block each, 8 x 8 maps for an input of 128 pixels, and one sigmoid output per label (theirs is binary).

Its blocks have one 3 x 3 convolution each, between two of 1 x 1, so a cell of the last maps sees 35 pixels of
the input. With the more usual two, and a first convolution of 7 x 7, it sees 99. On drawn discs and squares
that classified as well, but the cells that fired for a square lay around it, not on it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam_infer.intensity import Window
from sam_infer.networks.modelfile import Content, load_model, save_model
from sam_infer.networks.unet import from_square, to_square, windowed_slices
from sam_infer.types import FloatArray
from sam_infer.volumes import Image

FORMAT = "samloop-classifier/1"
#: Features of the four stages; own choice.
CHANNELS = (16, 32, 64, 128)
SIZE = 128
#: The side of the input over that of the last maps.
STRIDE = 16
#: A label counts as present from this probability on; own choice, the middle.
THRESHOLD = 0.5
#: Slices per forward pass.
BATCH = 32


def build_classifier(*, labels: int, channels: Sequence[int] = CHANNELS) -> nn.Module:
    """An untrained network.

    Args:
        labels: Number of labels.
        channels: Features of the four stages' 3 x 3 convolutions; what they hand on has four times as many.

    Returns:
        A module (B, 1, S, S) float32 in 0..1 -> (B, labels) logits; S a multiple of `STRIDE`.
    """
    from monai.networks.nets import ResNet

    return ResNet(
        "bottleneck",
        [1, 1, 1, 1],
        list(channels),
        spatial_dims=2,
        n_input_channels=1,
        conv1_t_size=3,
        conv1_t_stride=2,
        no_max_pool=True,
        num_classes=labels,
    )


def check_size(size: int) -> int:
    """The size itself, if the network can work at it: a multiple of `STRIDE`, at least twice that."""
    if size % STRIDE or size < 2 * STRIDE:
        raise ValueError(f"size = {size!r}: must be a multiple of {STRIDE} pixels, at least {2 * STRIDE}")
    return size


def last_maps(network: nn.Module) -> nn.Module:
    """The block whose output is averaged into the features that are classified: the last convolutions."""
    return list(network.get_submodule("layer4").children())[-1]


def activation_maps(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and where the network looks for every label, from one forward pass.

    The last maps A_n are averaged and weighed by one linear layer, so the gradient that GradCAM averages is
    the layer's weight w_n over the number of cells: its map is ReLU(sum of w_n A_n), but for a factor.

    Args:
        network: From `build_classifier`, in either mode.
        inputs: (B, 1, S, S) float32 in 0..1.

    Returns:
        (B, L) float32 logits, with their gradient, and (B, L, h, w) float32 maps without one, each from 0 to
        1 with both reached; 0 everywhere where a map is the same everywhere, and so shows nothing.
    """
    seen: list[Tensor] = []
    hook = last_maps(network).register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    try:
        logits: Tensor = network(inputs).float()
    finally:
        hook.remove()
    weight = network.get_submodule("fc").get_parameter("weight").detach()
    maps = torch.einsum("lc,bchw->blhw", weight.float(), seen[0].float()).relu()
    maps = maps - maps.amin((2, 3), keepdim=True)
    highest = maps.amax((2, 3), keepdim=True)
    return logits, maps / torch.where(highest > 0, highest, torch.ones_like(highest))


def on_slice(square: Tensor, height: int, width: int) -> FloatArray | None:
    """A map of the network's input as a map of the slice.

    Args:
        square: (S, S) float32.
        height: Of the slice in pixels.
        width: Of the slice in pixels.

    Returns:
        (height, width) float32, 0 to 1 with both reached; None where the map is the same everywhere, and so
        shows nothing.
    """
    native = from_square(square[None, None], height, width)[0, 0].cpu().numpy()
    low, high = float(native.min()), float(native.max())
    if not low < high:
        return None
    normalised: FloatArray = ((native - low) / (high - low)).astype(np.float32)
    return normalised


@dataclass(frozen=True, kw_only=True)
class ClassifierModel:
    """A trained classifier with everything that using it needs. Safe to call from several threads.

    Args:
        network: From `build_classifier`, in evaluation mode.
        labels: Label name to its value in label maps, in the order of the network's outputs.
        size: Longest side in pixels of what the network sees.
        channels: Features of the four stages.
        window: The window policy it was trained with, for the record.
        training: Figures of its training, for the record.
        threshold: Probability from which on a label counts as present.
        fingerprint: First 16 hex digits of the file's sha256; "" for a model that is not in a file.
    """

    network: nn.Module
    labels: Mapping[str, int]
    size: int = SIZE
    channels: tuple[int, ...] = CHANNELS
    window: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    threshold: float = THRESHOLD
    fingerprint: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def presence(self, image: Image, window: Window, slices: Sequence[int] | None = None) -> FloatArray:
        """How probable each label is on slices.

        Args:
            image: A 2D image or a volume of any size.
            window: How its values become 0..1.
            slices: Slice indices k; None = all.

        Returns:
            (n, L) float32 in 0..1: the slices in their order, the labels in that of `labels`.
        """
        slices = range(image.shape[2]) if slices is None else slices
        found = [np.zeros((0, len(self.labels)), np.float32)]
        for start in range(0, len(slices), BATCH):
            with self._lock, torch.inference_mode():
                logits = self.network(self._inputs(image, window, slices[start : start + BATCH]))
            found.append(torch.sigmoid(logits.float()).cpu().numpy())
        return np.concatenate(found)

    def activation(self, image: Image, window: Window, k: int, label: str) -> FloatArray | None:
        """Where the classifier looks for a label on a slice: GradCAM of the last maps.

        With A_n the last maps and s the label's logit, a_n is the mean of ds/dA_n over the pixels and the map
        is ReLU(sum of a_n A_n) (Selvaraju et al. 2017), min-max normalised.

        Args:
            image: The image.
            window: How its values become 0..1.
            k: Slice index.
            label: Name of the label.

        Returns:
            (H, W) float32, 0 to 1 with both reached, at the slice's own resolution; None where the map is
            the same everywhere, and so shows nothing.

        Raises:
            ValueError: When the model does not know the label.
        """
        if label not in self.labels:
            raise ValueError(f"label = {label!r}: choose one of {', '.join(self.labels)}")
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        target = ClassifierOutputTarget(list(self.labels).index(label))
        # The hooks of GradCAM are on the network itself, so nobody else may use it meanwhile.
        with self._lock, torch.inference_mode(False), torch.enable_grad():
            inputs = self._inputs(image, window, [k]).requires_grad_()
            with GradCAM(model=self.network, target_layers=[last_maps(self.network)]) as cam:
                square = cam(input_tensor=inputs, targets=[target])
        return on_slice(torch.from_numpy(square)[0], image.shape[1], image.shape[0])

    def _inputs(self, image: Image, window: Window, slices: Sequence[int]) -> Tensor:
        """(n, 1, S, S) float32 on the model's device."""
        pixels = torch.from_numpy(windowed_slices(image, window, slices))[:, None].to(self.device)
        return to_square(pixels, self.size)


def save_classifier(path: Path | str, model: ClassifierModel) -> str:
    """Write a model to one file, atomically.

    Args:
        path: The file; its folder is made where it is missing.
        model: What to write; its fingerprint is ignored.

    Returns:
        sha256 of the file's content, hex.
    """
    extra = {"channels": list(model.channels), "threshold": model.threshold}
    return save_model(path, model, kind=FORMAT, extra=extra)


def load_classifier(path: Path | str, *, device: str = "cpu") -> ClassifierModel:
    """Read a model from its file.

    Args:
        path: A file of `save_classifier`.
        device: Where the weights go ("cpu", "cuda", "cuda:0").

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is damaged or is something else.
    """

    def make(content: Content) -> ClassifierModel:
        channels = tuple(int(c) for c in content.header["channels"])
        network = build_classifier(labels=len(content.labels), channels=channels)
        network.load_state_dict(content.state)
        return ClassifierModel(
            network=network.to(device).eval().requires_grad_(False),
            channels=channels,
            threshold=float(content.header["threshold"]),
            **content.common(),
        )

    return load_model(path, make, kind=FORMAT, name="classifier")
