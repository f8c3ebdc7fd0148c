"""Segment Anything and its kin through segment-anything's own classes: one engine for their checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_infer.engines.architectures import VIT_B, Architecture
from sam_infer.engines.base import Embedding, Encoding
from sam_infer.engines.batches import decode_by_shape
from sam_infer.engines.checkpoint import digest_of, load_network
from sam_infer.engines.framing import SAM, Framing
from sam_infer.engines.runtime import AUTO, Encode, find_runtime, prepare
from sam_infer.tuning.extras import ExtraPrompts
from sam_infer.types import Candidates, FloatArray, Prompts

#: Side of the input, in pixels, up to which an encoder answers within some 0.3 s on a CPU, and an object is
#: better seen large than with much around it.
SMALL_SIDE = 256
#: Side of a crop over that of its object, for such an encoder.
SMALL_MARGIN = 1.5
#: Slices encoded at once on CUDA.
GPU_BATCH = 4


class SamEngine:
    """One checkpoint of a network with SAM's prompt encoder and mask decoder.

    A slice is encoded once, as the checkpoint's authors do (`Framing`), and prompts are decoded in a batch.

    Args:
        name: Registry name, such as "sam_vit_b".
        weights: Checkpoint file; read on first use.
        model: A ready ``segment_anything.modeling.Sam`` instead of a file (tests, tuned models).
        architecture: The network in the file.
        framing: What the checkpoint expects around its network.
        device: Torch device, such as "cpu" or "cuda:0".
        runtime: How the image encoder is run, one of `sam_infer.engines.runtime.RUNTIMES`.
        extras: What the model learned to be prompted with besides; None = a SAM's own prompts alone.

    Raises:
        InputError: When the runtime cannot run here.
    """

    def __init__(
        self,
        *,
        name: str = "sam_vit_b",
        weights: Path | None = None,
        model: Any = None,
        architecture: Architecture = VIT_B,
        framing: Framing = SAM,
        device: str = "cpu",
        runtime: str = AUTO,
        extras: ExtraPrompts | None = None,
    ) -> None:
        if (weights is None) == (model is None):
            raise ValueError("give either weights (a checkpoint file) or model (a Sam), not both or none")
        self._name = name
        self._weights = weights
        self._model = model
        self._architecture = architecture
        self._framing = framing
        self._device = torch.device(device)
        self._runtime = find_runtime(runtime, self._device)
        self._encoded_as: str | None = None
        self._extras = None if extras is None else extras.to(device).eval()
        self._digest: str | None = None
        self._encoder: Encode | None = None
        self._loading = threading.Lock()
        self._encoding = threading.Lock()

    @property
    def name(self) -> str:
        """Registry name."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the framing and the weights, and the runtime where it changes what they compute."""
        differs = self._runtime.differs
        return f"{self.digest}-{differs}" if differs else self.digest

    def with_model(
        self, model: Any, *, extras: ExtraPrompts | None = None, same_encoder: bool = False
    ) -> SamEngine:
        """An engine of another model of the same kind, framed and run as this one.

        Args:
            model: A ready ``segment_anything.modeling.Sam``.
            extras: What it learned to be prompted with besides.
            same_encoder: Whether its image encoder is this one's, so that embeddings of both are the same.
        """
        other = SamEngine(
            name=self.name,
            model=model,
            architecture=self._architecture,
            framing=self._framing,
            device=str(self._device),
            runtime=self._runtime.name,
            extras=extras,
        )
        other._encoded_as = self.fingerprint if same_encoder else None
        return other

    @property
    def framing(self) -> Framing:
        """What the checkpoint expects around its network."""
        return self._framing

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._device

    @property
    def digest(self) -> str:
        """SHA-256 of the framing and of the checkpoint file, or of the given model's parameters."""
        with self._loading:
            return self._identified()

    def _identified(self) -> str:
        """`digest`; whoever asks holds the lock of loading."""
        if self._digest is None:
            self._digest = digest_of(f"sam/v2/{self._framing}", self._weights, self._model)
        return self._digest

    @property
    def model(self) -> Any:
        """The ``segment_anything.modeling.Sam`` on its device, in eval mode; loaded once."""
        # Whoever asks may be in inference mode; what is loaded there could never learn.
        with self._loading, torch.inference_mode(False):
            if self._model is None:
                assert self._weights is not None
                self._model = load_network(self._weights, architecture=self._architecture)
                self._identified()  # now: the file may be replaced later, and clicks do not wait for it
            if not getattr(self, "_ready", False):
                self._model.to(self._device).eval()
                self._ready = True
            return self._model

    @property
    def encoding(self) -> Encoding:
        """The image side of the model; a ViT of more than 256 pixels is cheap on a GPU only."""
        side = int(self.model.image_encoder.img_size)
        small, cuda = side <= SMALL_SIDE, self._device.type == "cuda"
        usual = Encoding(
            side=side, cheap=small or cuda, device=str(self._device), fingerprint=self._encoded_as
        )
        return replace(usual, margin=SMALL_MARGIN) if small else usual

    @torch.inference_mode()
    def encode(self, image: FloatArray) -> Embedding:
        """Encode one slice; see `sam_infer.engines.base.Engine.encode`."""
        return self.encode_batch([image])[0]

    @torch.inference_mode()
    def encode_batch(self, images: Sequence[FloatArray]) -> list[Embedding]:
        """Encode slices, on CUDA several at once; what that took of its memory is given back.

        Args:
            images: Each as in `encode`; their sizes may differ.
        """
        cuda = self._device.type == "cuda"
        step = GPU_BATCH if cuda else 1
        features: list[torch.Tensor] = []
        for start in range(0, len(images), step):
            batch = self._features(images[start : start + step])
            features += [one.clone() for one in batch.split(1)]
        if cuda and len(images) > 1:
            torch.cuda.empty_cache()
        return [
            Embedding(image_size=(image.shape[0], image.shape[1]), features={"image": feature})
            for image, feature in zip(images, features, strict=True)
        ]

    def _features(self, images: Sequence[FloatArray]) -> torch.Tensor:
        model = self.model
        pixels = torch.cat([self._framing.image(image, model, self._device) for image in images])
        with self._encoding:
            if self._encoder is None:
                encoder, digest = model.image_encoder, self.digest
                self._encoder = prepare(self._runtime, encoder, side=encoder.img_size, digest=digest)
            return self._encoder(pixels)

    @torch.inference_mode()
    def decode(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode prompts; see `sam_infer.engines.base.Engine.decode`."""
        return decode_by_shape(prompts, lambda batch: self._decode_batch(embedding, batch))

    def _decode_batch(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        model, framing = self.model, self._framing
        size = embedding.image_size
        side = model.image_encoder.img_size
        first = prompts[0]

        def tensor(array: NDArray[Any], kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.as_tensor(array, dtype=kind, device=self._device)

        points = boxes = masks = None
        if len(first.points):
            coordinates = framing.points(np.stack([p.points for p in prompts]), size, side)
            points = (tensor(coordinates), tensor(np.stack([p.point_labels for p in prompts]), torch.int))
        if first.box is not None:
            boxes = tensor(framing.boxes(np.asarray([p.box for p in prompts], np.float64), size, side))
        if first.mask_logits is not None:
            given = tensor(np.stack([np.asarray(p.mask_logits) for p in prompts]))
            masks = framing.mask_input(given, side, model.prompt_encoder.mask_input_size[0])
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=masks)
        if first.text is not None or first.attention is not None:
            if self._extras is None:
                raise ValueError(f"{self.name} did not learn to be prompted with text or attention")
            grid, text, attention = dense.shape[-1], None, None
            if first.text is not None:
                text = tensor(np.stack([np.asarray(p.text) for p in prompts]))
            if first.attention is not None:
                given = tensor(np.stack([np.asarray(p.attention) for p in prompts]))
                attention = framing.padded(given, side, grid)
            sparse, dense = self._extras(sparse, dense, text=text, attention=attention)
        low, iou = model.mask_decoder(
            image_embeddings=embedding.features["image"],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=framing.several(first),
        )
        logits = framing.native(low, size, model).cpu().numpy()
        quality = iou.float().clamp(0, 1).cpu().numpy()
        return [Candidates(logits=logits[n], iou=quality[n]) for n in range(len(prompts))]
