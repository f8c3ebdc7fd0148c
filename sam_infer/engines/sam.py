"""Segment Anything (ViT) through segment-anything's own classes, so that every SAM checkpoint runs here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sam_infer.engines.base import Embedding
from sam_infer.engines.checkpoint import load_sam
from sam_infer.types import Candidates, FloatArray, Prompts


class SamEngine:
    """One SAM ViT checkpoint.

    The image is encoded as segment-anything's ``SamPredictor`` does (longest side to 1024, normalised, zero
    padded) and prompts are decoded in a batch. Candidates are SAM's three masks where one point is the whole
    prompt, and its single refined mask otherwise, as its authors advise.

    Args:
        name: Registry name: "sam_vit_b", "sam_vit_l" or "sam_vit_h".
        weights: Checkpoint file in segment-anything's format; read with ``weights_only`` on first use.
        model: A ready ``segment_anything.modeling.Sam`` instead of a file (tests, tuned models).
        device: Torch device, such as "cpu" or "cuda:0".
    """

    def __init__(
        self, *, name: str = "sam_vit_b", weights: Path | None = None, model: Any = None, device: str = "cpu"
    ) -> None:
        if (weights is None) == (model is None):
            raise ValueError("give either weights (a checkpoint file) or model (a Sam), not both or none")
        self._name = name
        self._weights = weights
        self._model = model
        self._device = torch.device(device)
        self._fingerprint: str | None = None
        self._loading = threading.Lock()
        self._encoding = threading.Lock()

    @property
    def name(self) -> str:
        """Registry name."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint file, or of the given model's parameters."""
        with self._loading:
            if self._fingerprint is None:
                digest = hashlib.sha256(b"sam/1024/v1")
                if self._weights is not None:
                    with self._weights.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                else:
                    for key, value in self._model.state_dict().items():
                        digest.update(key.encode())
                        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
                self._fingerprint = digest.hexdigest()
            return self._fingerprint

    @property
    def model(self) -> Any:
        """The ``segment_anything.modeling.Sam`` on its device, in eval mode; loaded once."""
        with self._loading:
            if self._model is None:
                assert self._weights is not None
                self._model = load_sam(self._name, self._weights)
            if not getattr(self, "_ready", False):
                self._model.to(self._device).eval()
                self._ready = True
            return self._model

    @torch.inference_mode()
    def encode(self, image: FloatArray) -> Embedding:
        """Encode one slice; see `sam_infer.engines.base.Engine.encode`."""
        from segment_anything.utils.transforms import ResizeLongestSide

        model = self.model
        rgb = np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image
        rgb8 = np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
        resized = ResizeLongestSide(model.image_encoder.img_size).apply_image(rgb8)
        tensor = torch.as_tensor(resized, device=self._device).permute(2, 0, 1)[None].float()
        with self._encoding:
            features = model.image_encoder(model.preprocess(tensor))
        return Embedding(image_size=(image.shape[0], image.shape[1]), features={"image": features})

    @torch.inference_mode()
    def decode(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode prompts; see `sam_infer.engines.base.Engine.decode`.

        Prompts of one shape (number of points, box or none, mask or none) are decoded as one batch.
        """
        groups: dict[tuple[int, bool, bool], list[int]] = {}
        for index, prompt in enumerate(prompts):
            if prompt.is_empty:
                raise ValueError(f"prompt {index} is empty")
            shape = (len(prompt.points), prompt.box is not None, prompt.mask_logits is not None)
            groups.setdefault(shape, []).append(index)
        results: dict[int, Candidates] = {}
        for indices in groups.values():
            batch = self._decode_batch(embedding, [prompts[i] for i in indices])
            results.update(zip(indices, batch, strict=True))
        return [results[i] for i in range(len(prompts))]

    def _decode_batch(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        from segment_anything.utils.transforms import ResizeLongestSide

        model = self.model
        size = embedding.image_size
        side = model.image_encoder.img_size
        resize = ResizeLongestSide(side)
        first = prompts[0]

        def tensor(array: NDArray[Any], kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.as_tensor(array, dtype=kind, device=self._device)

        points = boxes = masks = None
        if len(first.points):
            coordinates = np.stack([resize.apply_coords(p.points.astype(np.float64), size) for p in prompts])
            points = (tensor(coordinates), tensor(np.stack([p.point_labels for p in prompts]), torch.int))
        if first.box is not None:
            boxes = tensor(resize.apply_boxes(np.asarray([p.box for p in prompts], np.float64), size))
        scaled = resize.get_preprocess_shape(size[0], size[1], side)
        if first.mask_logits is not None:
            masks = self._mask_input(np.stack([np.asarray(p.mask_logits) for p in prompts]), scaled, side)
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=masks)
        ambiguous = len(first.points) == 1 and boxes is None and masks is None
        low, iou = model.mask_decoder(
            image_embeddings=embedding.features["image"],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=ambiguous,
        )
        logits = model.postprocess_masks(low, scaled, size).float().cpu().numpy()
        quality = iou.float().clamp(0, 1).cpu().numpy()
        return [Candidates(logits=logits[n], iou=quality[n]) for n in range(len(prompts))]

    def _mask_input(self, logits: FloatArray, scaled: tuple[int, int], side: int) -> torch.Tensor:
        """Native (B, H, W) logits to SAM's (B, 1, side/4, side/4) mask input, padded as its image is."""
        mask = torch.as_tensor(logits, dtype=torch.float32, device=self._device)[:, None].clamp(-20, 20)
        quarter = [max(1, round(s / 4)) for s in scaled]
        mask = F.interpolate(mask, quarter, mode="bilinear", align_corners=False, antialias=True)
        low = side // 4
        return F.pad(mask, (0, low - quarter[1], 0, low - quarter[0]), value=float(mask.min()))
