"""Adapters beside the perceptrons of an image encoder, as SAM-Med2D has them.

Cheng et al., SAM-Med2D, arXiv:2308.16184: a block's tokens become x + MLP(LN(x)) + Adapter(LN(x)). Their
adapter ends in a normalisation, so an untrained one changes every answer; they learn from millions of masks.
Here a clinician waits for the next mask: an added adapter is weighed by a learned number that starts at 0, so
that the network answers as before until it has learned something. That is this project's own choice. A
network that comes with adapters, as SAM-Med2D does, keeps those it has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn

from sam_infer.networks.sammed2d import Adapter
from sam_infer.networks.tinyvit import Perceptron as TinyPerceptron


class GatedAdapter(Adapter):
    """SAM-Med2D's adapter, weighed by ``gate``, which starts at 0.

    Args:
        width: Channels of the tokens, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) tokens to the same shape; H and W even."""
        return self.gate * super().forward(x)


class AdaptedMLP(MLPBlock):
    """segment-anything's perceptron and an adapter on the same tokens.

    Args:
        perceptron: The one whose layers this one takes over, under the same names.
    """

    def __init__(self, perceptron: MLPBlock) -> None:
        nn.Module.__init__(self)
        self.lin1, self.lin2, self.act = perceptron.lin1, perceptron.lin2, perceptron.act
        self.adapter = GatedAdapter(self.lin1.in_features).to(self.lin1.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) normalised tokens to the same shape; H and W even."""
        out: Tensor = super().forward(x) + self.adapter(x)
        return out


class AdaptedPerceptron(TinyPerceptron):
    """TinyViT's perceptron, which normalises its tokens itself, and an adapter on the normalised ones.

    Args:
        perceptron: The one whose layers this one takes over, under the same names.
    """

    def __init__(self, perceptron: TinyPerceptron) -> None:
        nn.Module.__init__(self)
        self.norm, self.fc1, self.fc2 = perceptron.norm, perceptron.fc1, perceptron.fc2
        self.adapter = GatedAdapter(self.fc1.in_features).to(self.fc1.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) tokens to the same shape; H and W even."""
        out: Tensor = super().forward(x) + self.adapter(self.norm(x))
        return out


_ADAPTED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    MLPBlock: AdaptedMLP,
    TinyPerceptron: AdaptedPerceptron,
}


def adapters(encoder: nn.Module) -> list[nn.Module]:
    """The adapters of an image encoder; where it has none, one is put beside each perceptron, in place.

    Args:
        encoder: A Segment Anything's image encoder, of segment-anything, SAM-Med2D or MobileSAM.

    Returns:
        The adapters, in the order of the encoder.

    Raises:
        ValueError: When it has no perceptron to put one beside.
    """
    found = _found(encoder)
    if not found:
        for block in list(encoder.modules()):
            for name, child in list(block.named_children()):
                if type(child) in _ADAPTED:
                    setattr(block, name, _ADAPTED[type(child)](child))
        found = _found(encoder)
    if not found:
        raise ValueError(f"{type(encoder).__name__} has no perceptron to put an adapter beside")
    return found


def _found(encoder: nn.Module) -> list[nn.Module]:
    return [module for module in encoder.modules() if isinstance(module, Adapter)]
