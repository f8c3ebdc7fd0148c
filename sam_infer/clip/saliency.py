"""Where a CLIP model looks for a text on a slice: gScoreCAM, GradCAM and M2IB.

`gscorecam` is MedCLIP-SAM's and `m2ib` MedCLIP-SAMv2's, as the authors' code runs them but for the layer of
the first; `gradcam` is Selvaraju et al.'s, on the same activations, and the cheapest by far.

The layer: MedCLIP-SAM's code takes the activations behind the second norm of the last block. Where the
embedding is that of the class token, as BiomedCLIP's is, no other token is read after that block's
attention. So the gradient at every patch is exactly zero there, whatever the text: the "most important"
channels are no choice at all, and GradCAM shows nothing. Here activations are those behind the first norm
of the last block, which its attention reads. That is this project's own choice; ``second=True`` takes the
published layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_infer.clip.model import ClipModel, Loaded
from sam_infer.clip.towers import changed
from sam_infer.types import FloatArray

#: Channels that gScoreCAM tries, published.
CHANNELS = 300
#: Images in one pass of the tower; of no effect on the result, and small for the memory of a small computer.
BATCH = 16
#: M2IB's weight of compression: published for breast ultrasound (2.0 for brain MRI).
BETA = 1.0
#: M2IB's steps, copies, step size and first value of alpha, published.
STEPS = 10
COPIES = 10
RATE = 1.0
ALPHA = 5.0
#: M2IB's block as a share of all: 9 of 12, published.
DEPTH = 9 / 12

#: (model, (H, W) or (H, W, 3) float32 slice in 0..1, text) -> (H, W) float32, 0 to 1, or None where the map
#: is the same everywhere.
Saliency = Callable[[ClipModel, FloatArray, str], FloatArray | None]


def gradcam(model: ClipModel, pixels: FloatArray, text: str, *, second: bool = False) -> FloatArray | None:
    """GradCAM: each channel weighs what the gradient of the logit says of it on average.

    With A_n the activations at the patches and s the logit of slice and text, a_n is the mean of ds/dA_n over
    the patches and the map is ReLU(sum of a_n A_n) (Selvaraju et al. 2017), min-max normalised.

    Args:
        model: The model.
        pixels: (H, W) or (H, W, 3) float32, 0..1.
        text: What is looked for.
        second: Take the activations behind the last block's second norm.

    Returns:
        (H, W) float32, 0 to 1 with both reached; None where the map is the same everywhere.
    """
    wanted = model.text([text])[0]
    with model.opened() as loaded:
        activations, gradients = _tapped(loaded, loaded.inputs(pixels), _on(loaded, wanted), second=second)
        weights = gradients.mean((2, 3), keepdim=True)
        return _finished(F.relu((weights * activations).sum(1)), pixels)


def gscorecam(
    model: ClipModel, pixels: FloatArray, text: str, *, channels: int = CHANNELS, second: bool = False
) -> FloatArray | None:
    """gScoreCAM: each of the best channels weighs what the model says of the slice seen through it.

    The ``channels`` channels of the highest mean gradient are kept. Each kept map, resized and min-max
    normalised, is multiplied with the normalised slice, and the model gives the product a logit; channels
    that are not kept have the logit 0. The softmax of the logits over all channels weighs the maps, and
    the map is ReLU of their sum, min-max normalised.

    Args:
        model: The model.
        pixels: (H, W) or (H, W, 3) float32, 0..1.
        text: What is looked for.
        channels: How many are kept: so many passes of the image tower.
        second: Take the activations behind the last block's second norm, as published.

    Returns:
        (H, W) float32, 0 to 1 with both reached; None where the map is the same everywhere.
    """
    wanted = model.text([text])[0]
    with model.opened() as loaded:
        image, target = loaded.inputs(pixels), _on(loaded, wanted)
        activations, gradients = _tapped(loaded, image, target, second=second)
        kept = gradients.mean((2, 3))[0].topk(min(channels, activations.shape[1])).indices
        scores = activations.new_zeros(activations.shape[1])
        with torch.no_grad():
            for some in kept.split(BATCH):
                masks = F.interpolate(
                    activations[:, some], image.shape[2:], mode="bilinear", align_corners=True
                )[0, :, None]
                low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
                scores[some] = loaded.logits(image * (masks - low) / (high - low + 1e-6), target)
        weights = scores.softmax(0)[None, :, None, None]
        return _finished(F.relu((weights * activations).sum(1)), pixels)


def m2ib(
    model: ClipModel,
    pixels: FloatArray,
    text: str,
    *,
    beta: float = BETA,
    block: int | None = None,
    seed: int = 0,
) -> FloatArray | None:
    """M2IB: what a bottleneck must let through for the slice to still fit the text.

    Behind one block each token and channel x is mixed with noise, t = l x + (1 - l) e with l = sigmoid(alpha)
    and e normal. Alpha is fitted to lose as much as it may and keep the cosine of t's embedding with the
    text: beta times the mean of KL(t, normal) minus the cosine. The map is the sum of KL over the channels
    of each patch, min-max normalised.

    Args:
        model: The model.
        pixels: (H, W) or (H, W, 3) float32, 0..1.
        text: What is looked for.
        beta: Weight of what is lost.
        block: Behind which block, from 0; None = the published 9 of 12, and of other depths the same share,
            but never the last block, behind which no patch is read (both are this project's own choice).
        seed: Of the noise.

    Returns:
        (H, W) float32, 0 to 1 with both reached; None where the map is the same everywhere.

    Raises:
        ValueError: When the model has no such block, or only one.
    """
    wanted = model.text([text])[0]
    with model.opened() as loaded:
        last = len(loaded.tower.blocks) - 1
        block = min(round(DEPTH * (last + 1)), last - 1) if block is None else block
        if not 0 <= block < last:
            raise ValueError(f"block = {block}: choose one from 0 to {last - 1}")
        image, target = loaded.inputs(pixels), _on(loaded, wanted)
        generator = torch.Generator(image.device).manual_seed(seed)
        bottleneck = _Bottleneck(generator)
        with changed(loaded.tower.blocks[block], bottleneck):
            with torch.no_grad():
                loaded.embed(image)
            assert bottleneck.alpha is not None
            optimizer = torch.optim.Adam([bottleneck.alpha], lr=RATE)
            for _ in range(STEPS):
                cosine = (loaded.embed(image) @ target).mean()
                assert bottleneck.divergence is not None
                (gradient,) = torch.autograd.grad(
                    beta * bottleneck.divergence.mean() - cosine, bottleneck.alpha
                )
                bottleneck.alpha.grad = gradient
                optimizer.step()
        assert bottleneck.divergence is not None
        return _finished(loaded.tower.maps(bottleneck.divergence.detach()).sum(1), pixels)


#: The methods by name.
SALIENCIES: dict[str, Saliency] = {"gradcam": gradcam, "m2ib": m2ib, "gscorecam": gscorecam}


class _Bottleneck:
    """Mixes the tokens of a block with noise. The first pass only tells their shape, and lets them through.

    ``divergence`` is KL of the last pass, (1, N, C).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.alpha: Tensor | None = None
        self.divergence: Tensor | None = None
        self._generator = generator

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.alpha is None:
            self.alpha = torch.full_like(tokens, ALPHA).requires_grad_()
            return tokens
        tokens = tokens.detach()
        mean = self.alpha.sigmoid() * tokens
        log_spread = F.logsigmoid(-self.alpha)
        spread = log_spread.exp()
        self.divergence = -0.5 * (1 + 2 * log_spread - mean**2 - spread**2)
        noise = torch.randn(
            (COPIES, *tokens.shape[1:]), generator=self._generator, device=tokens.device, dtype=tokens.dtype
        )
        return mean + spread * noise


def _on(loaded: Loaded, text: FloatArray) -> Tensor:
    return torch.from_numpy(text).to(loaded.mean.device)


def _tapped(loaded: Loaded, image: Tensor, text: Tensor, *, second: bool) -> tuple[Tensor, Tensor]:
    """The last block's activations at the patches and the logit's gradient there, (1, C, rows, columns)."""
    kept: list[Tensor] = []

    def keep(tokens: Tensor) -> Tensor:
        kept.append(tokens.detach().requires_grad_())
        return kept[0]

    with changed(loaded.tower.norms[-1][second], keep):
        logit = loaded.logits(image, text).sum()
    (gradient,) = torch.autograd.grad(logit, kept[0])
    return loaded.tower.maps(kept[0].detach()), loaded.tower.maps(gradient)


def _finished(grid: Tensor, pixels: FloatArray) -> FloatArray | None:
    """(1, rows, columns) at the slice's own resolution, min-max normalised; None where it is flat."""
    size = (pixels.shape[0], pixels.shape[1])
    spread = F.interpolate(grid[None].float(), size, mode="bilinear", align_corners=False)[0, 0]
    low, high = spread.min(), spread.max()
    if not bool(high > low):
        return None
    found: FloatArray = ((spread - low) / (high - low)).cpu().numpy()
    return found
