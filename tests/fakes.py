"""An engine simple enough to be right by eye: the bright component under the prompt."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from sam_infer.engines.base import Embedding, Encoding
from sam_infer.types import Candidates


class ThresholdEngine:
    """Segments what is brighter than 0.5 and connected to a positive click, or inside the box or mask.

    Background clicks remove the component that they hit. Counts its calls.
    """

    name = "threshold"
    fingerprint = "threshold-1"
    encoding = None

    def __init__(self):
        self.encoded = 0
        self.decoded = []

    def encode(self, image):
        self.encoded += 1
        grey = image.mean(axis=-1) if image.ndim == 3 else image
        return Embedding(image_size=grey.shape, features={"image": torch.from_numpy(grey.copy())})

    def decode(self, embedding, prompts):
        return [self._one(embedding.features["image"].numpy(), prompt) for prompt in prompts]

    def _one(self, grey, prompt):
        assert not prompt.is_empty
        self.decoded.append(prompt)
        bright = grey > 0.5
        if prompt.box is not None:
            x0, y0, x1, y1 = (round(v) for v in prompt.box)
            inside = np.zeros_like(bright)
            inside[y0 : y1 + 1, x0 : x1 + 1] = True
            bright &= inside
        labels, _ = ndimage.label(bright)
        chosen = {int(labels[int(y), int(x)]) for x, y in prompt.positive} - {0}
        if prompt.mask_logits is not None:
            chosen |= set(np.unique(labels[prompt.mask_logits > 0]).tolist()) - {0}
        elif not len(prompt.positive):
            chosen |= set(np.unique(labels).tolist()) - {0}
        chosen -= {int(labels[int(y), int(x)]) for x, y in prompt.negative}
        mask = np.isin(labels, sorted(chosen))
        logits = np.where(mask, 5.0, -5.0).astype(np.float32)[None]
        return Candidates(logits=logits, iou=np.array([0.9 if mask.any() else 0.0], np.float32))


class CoarseEngine(ThresholdEngine):
    """Sees a slice resampled to ``side`` pixels, as SAM does, so that small objects blur away.

    ``shapes`` holds the (H, W) of all that was encoded.
    """

    name = "coarse"

    def __init__(self, side=64, *, cheap=False, fingerprint="coarse-1"):
        super().__init__()
        self.encoding = Encoding(side=side, cheap=cheap, device="cpu")
        self.fingerprint = fingerprint
        self.shapes = []

    def encode(self, image):
        self.encoded += 1
        self.shapes.append(image.shape[:2])
        grey = torch.from_numpy(np.ascontiguousarray(image.mean(axis=-1) if image.ndim == 3 else image))
        scale = self.encoding.side / max(grey.shape)
        small = [max(1, round(n * scale)) for n in grey.shape]
        mode = {"mode": "area"} if scale < 1 else {"mode": "bilinear", "align_corners": False}
        seen = torch.nn.functional.interpolate(grey[None, None], small, **mode)
        return Embedding(image_size=tuple(grey.shape), features={"image": seen})

    def decode(self, embedding, prompts):
        grey = torch.nn.functional.interpolate(
            embedding.features["image"], embedding.image_size, mode="bilinear", align_corners=False
        )
        return [self._one(grey[0, 0].numpy(), prompt) for prompt in prompts]


class RememberingEngine(ThresholdEngine):
    """Follows the bright components that the mask before touches, and remembers what it was asked.

    A positive click on the way adds the component that it hits, a negative one removes it.
    """

    name = "remembering"
    fingerprint = "remembering-1"

    def __init__(self):
        super().__init__()
        self.paths = []

    def track(self, path, *, seeds, embedding, clicks, length):
        self.paths.append((path, sorted(seeds), length))
        mask = seeds[path.start - path.step]
        for k in path:
            labels, _ = ndimage.label(embedding(k).features["image"].numpy() > 0.5)
            chosen = set(np.unique(labels[mask]).tolist()) - {0}
            chosen |= {int(labels[int(y), int(x)]) for x, y in clicks(k).positive}
            chosen -= {int(labels[int(y), int(x)]) for x, y in clicks(k).negative}
            mask = np.isin(labels, sorted(chosen - {0}))
            logits = np.where(mask, 5.0, -5.0).astype(np.float32)[None]
            yield k, Candidates(logits=logits, iou=np.array([0.9], np.float32))
