"""Segment Anything 2.1 and MedSAM2 through sam2's own classes, with its memory for volumes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sam_infer.engines.base import Embedding, Encoding
from sam_infer.engines.batches import decode_by_shape
from sam_infer.engines.checkpoint import digest_of
from sam_infer.engines.sam2memory import STRONGEST, SliceMemory, high_resolution
from sam_infer.engines.sam2model import load_sam2
from sam_infer.types import BoolArray, Candidates, FloatArray, Prompts

#: Mean and standard deviation of ImageNet's colours, 0 to 1, which sam2 normalises with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Conditioning slices that memory holds at most: each costs as much as a slice that was followed.
CONDITIONING = 4


class Sam2Engine:
    """One SAM 2.1 checkpoint.

    The image is encoded as sam2's ``SAM2ImagePredictor`` does (resized to a square, normalised), from float
    values rather than 8-bit ones, and prompts are decoded in a batch. Candidates are its three masks where
    one point is the whole prompt, and one mask otherwise. No state outlives a call. Inference is in bfloat16
    on CUDA, within each call only, and in float32 elsewhere.

    Args:
        name: Registry name, one of `sam_infer.engines.sam2model.VARIANTS`.
        weights: Checkpoint file in sam2's format; read with ``weights_only`` on first use.
        model: A ready ``sam2.modeling.sam2_base.SAM2Base`` instead of a file (tests, tuned models).
        device: Torch device, such as "cpu" or "cuda:0".
        offload: Keep the memories of a volume's slices in main memory instead of on the device; a step brings
            back some 15 MB of them.
    """

    def __init__(
        self,
        *,
        name: str = "sam2.1_tiny",
        weights: Path | None = None,
        model: Any = None,
        device: str = "cpu",
        offload: bool = True,
    ) -> None:
        if (weights is None) == (model is None):
            raise ValueError(
                "give either weights (a checkpoint file) or model (a SAM2Base), not both or none"
            )
        self._name = name
        self._weights = weights
        self._model = model
        self._device = torch.device(device)
        self._storage = torch.device("cpu") if offload else self._device
        self._fingerprint: str | None = None
        self._ready = False
        self._loading = threading.Lock()
        self._encoding = threading.Lock()

    @property
    def name(self) -> str:
        """Registry name."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint file, or of the given model's parameters, and of the variant's name.

        Marked on CUDA, where encoding in bfloat16 gives other features.
        """
        with self._loading:
            return self._identified()

    def _identified(self) -> str:
        """The fingerprint; whoever asks holds the lock of loading."""
        if self._fingerprint is None:
            digest = digest_of(f"sam2/{self._name}/v1", self._weights, self._model)
            self._fingerprint = f"{digest}-bf16" if self._device.type == "cuda" else digest
        return self._fingerprint

    @property
    def model(self) -> Any:
        """The ``SAM2Base`` on its device, in eval mode; loaded once."""
        with self._loading:
            if self._model is None:
                assert self._weights is not None
                self._model = load_sam2(self._name, self._weights)
                self._identified()  # now: the file may be replaced later, and clicks do not wait for it
            if not self._ready:
                self._model.to(self._device).eval()
                self._ready = True
            return self._model

    @property
    def encoding(self) -> Encoding:
        """The image side of the model; encoding is cheap on a GPU only."""
        return Encoding(
            side=int(self.model.image_size), cheap=self._device.type == "cuda", device=str(self._device)
        )

    def encode(self, image: FloatArray) -> Embedding:
        """Encode one slice; see `sam_infer.engines.base.Engine.encode`."""
        model = self.model
        side = model.image_size
        with self._inference(), self._encoding:
            pixels = torch.as_tensor(image, dtype=torch.float32, device=self._device)
            pixels = pixels.permute(2, 0, 1)[None] if image.ndim == 3 else pixels[None, None]
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)
            mean, deviation = (torch.tensor(v, device=self._device)[:, None, None] for v in (MEAN, DEVIATION))
            fine, middle, coarse = model.forward_image((pixels - mean) / deviation)["backbone_fpn"]
        return Embedding(
            image_size=(image.shape[0], image.shape[1]),
            features={"image_embed": coarse, "high_res_feats_0": fine, "high_res_feats_1": middle},
        )

    def decode(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode prompts; see `sam_infer.engines.base.Engine.decode`."""
        with self._inference():
            return decode_by_shape(prompts, lambda batch: self._decode_batch(embedding, batch))

    def track(
        self,
        path: range,
        *,
        seeds: Mapping[int, BoolArray],
        embedding: Callable[[int], Embedding],
        clicks: Callable[[int], Prompts],
        length: int,
    ) -> Iterator[tuple[int, Candidates]]:
        """Follow an object from memory; see `sam_infer.engines.base.VideoEngine.track`."""
        model = self.model
        memory = SliceMemory(model=model, length=length, reverse=path.step < 0, storage=self._storage)
        for k in sorted(seeds, key=lambda k: abs(k - path.start))[:CONDITIONING]:
            features = embedding(k)
            with self._inference():
                memory.condition(k, features, seeds[k])
        for k in path:
            features, prompts = embedding(k), clicks(k)
            with self._inference():
                points = self._points([prompts], features.image_size) if len(prompts.points) else None
                found = memory.follow(k, features, points)
            yield k, found

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, and bfloat16 on CUDA; both end with the block."""
        bfloat = torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda")
        with torch.inference_mode(), bfloat:
            yield

    def _decode_batch(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        model = self.model
        first = prompts[0]
        masks = None
        if first.mask_logits is not None:
            masks = self._mask_input(np.stack([np.asarray(p.mask_logits) for p in prompts]))
        sparse, dense = model.sam_prompt_encoder(
            points=self._points(prompts, embedding.image_size), boxes=None, masks=masks
        )
        image = embedding.features["image_embed"] + model.no_mem_embed.reshape(1, -1, 1, 1)
        low, iou, _, _ = model.sam_mask_decoder(
            image_embeddings=image,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=len(first.points) == 1 and first.box is None and masks is None,
            repeat_image=len(prompts) > 1,
            high_res_features=high_resolution(embedding),
        )
        logits = F.interpolate(low.float(), embedding.image_size, mode="bilinear", align_corners=False)
        values, quality = logits.cpu().numpy(), iou.float().clamp(0, 1).cpu().numpy()
        return [Candidates(logits=values[n], iou=quality[n]) for n in range(len(prompts))]

    def _points(
        self, prompts: Sequence[Prompts], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Boxes and points of prompts of one shape, in the network's image; None where there are none.

        Returns:
            (B, N, 2) float32 xy and (B, N) int32 labels, a box being two points with labels 2 and 3.
        """
        corners = [np.reshape(p.box or (), (-1, 2)) for p in prompts]
        xy = np.stack([np.concatenate([c, p.points]) for c, p in zip(corners, prompts, strict=True)])
        labels = np.stack(
            [[2, 3][: len(c)] + p.point_labels.tolist() for c, p in zip(corners, prompts, strict=True)]
        )
        if not xy.shape[1]:
            return None
        scaled = torch.as_tensor(xy, dtype=torch.float32) / torch.tensor(size[::-1]) * self.model.image_size
        return scaled.to(self._device), torch.as_tensor(labels, dtype=torch.int32, device=self._device)

    def _mask_input(self, logits: FloatArray) -> torch.Tensor:
        """Native (B, H, W) logits to the (B, 1, side/4, side/4) mask input."""
        mask = torch.as_tensor(logits, dtype=torch.float32, device=self._device)[:, None]
        mask = mask.clamp(-STRONGEST, STRONGEST)
        size = self.model.sam_prompt_encoder.mask_input_size
        return F.interpolate(mask, size, mode="bilinear", align_corners=False, antialias=True)
