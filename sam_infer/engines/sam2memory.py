"""SAM 2's memory of one object: what it looked like on some slices, and what it looks like on the next one.

The memory bank of Ravi et al., "SAM 2: Segment Anything in Images and Videos" (arXiv:2408.00714, section 4),
run slice by slice on features that are already encoded, as sam2's ``SAM2VideoPredictor`` runs it on frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from sam_infer.engines.base import Embedding
from sam_infer.types import BoolArray, Candidates

#: Holes of up to this many pixels of the low-resolution mask are filled, as sam2's video predictor does.
HOLE = 8
#: Previous logits are kept within this, as sam2's predictors do.
STRONGEST = 32.0


class SliceMemory:
    """The memory of one object while one path through a volume is followed; made per call, never shared.

    Holds the conditioning slices, the last ``num_maskmem - 1`` memories and the last object pointers, however
    long the path is. Call it in `torch.inference_mode`.

    Args:
        model: A ``sam2.modeling.sam2_base.SAM2Base`` in eval mode.
        length: Number of slices of the volume.
        reverse: True where the path runs towards slice 0.
        storage: Where memories wait between slices, such as "cpu" to spare a GPU.
    """

    def __init__(self, *, model: Any, length: int, reverse: bool, storage: torch.device) -> None:
        self._model = model
        self._length = length
        self._reverse = reverse
        self._storage = storage
        self._conditioning: dict[int, dict[str, Any]] = {}
        self._followed: dict[int, dict[str, Any]] = {}

    def condition(self, k: int, embedding: Embedding, mask: BoolArray) -> None:
        """Remember a mask as what the object looks like on slice ``k``.

        Args:
            k: Slice index.
            embedding: Of that slice.
            mask: (H, W) bool.
        """
        model = self._model
        side = model.image_size
        pixels = torch.as_tensor(mask, dtype=torch.float32, device=model.device)[None, None]
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)
            pixels = (pixels >= 0.5).float()
        features = embedding.features
        _, _, _, low, _, pointer, score = model._use_mask_as_output(
            features["image_embed"], high_resolution(embedding), pixels
        )
        upsampled = self._upsample(fill_holes(low))
        self._conditioning[k] = self._remember(
            features["image_embed"], upsampled, pointer, score, prompted=True
        )

    def follow(
        self, k: int, embedding: Embedding, points: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Candidates:
        """Find the object on slice ``k`` from memory, and remember it there.

        Args:
            k: Slice index, the next one of the path.
            embedding: Of that slice.
            points: Clicks that correct what memory says: (1, N, 2) float32 xy in pixels of the network's
                image and (1, N) int32 labels; None = none.

        Returns:
            One candidate; its mask is empty where the network sees no object on the slice.
        """
        image = embedding.features["image_embed"]
        seen = self._attend(k, image)
        iou, low, high, pointer, score = self._decode(seen, embedding, None, None)
        shown = fill_holes(low)
        if points is not None:
            before = shown.clamp(-STRONGEST, STRONGEST)
            iou, low, _, pointer, score = self._decode(seen, embedding, points, before)
            shown = fill_holes(low)
            high = self._upsample(shown)
        self._followed[k] = self._remember(image, high, pointer, score, prompted=points is not None)
        self._forget(k)
        logits = F.interpolate(shown, embedding.image_size, mode="bilinear", align_corners=False)
        best = iou.float().amax(dim=-1).cpu().numpy()
        return Candidates(logits=logits[0].float().cpu().numpy(), iou=best)

    def _attend(self, k: int, image: torch.Tensor) -> torch.Tensor:
        """(1, C, h, w): the features of slice ``k`` after memory attention."""
        position = self._model.image_encoder.neck.position_encoding(image)
        return self._model._prepare_memory_conditioned_features(
            frame_idx=k,
            is_init_cond_frame=False,
            current_vision_feats=[_tokens(image)],
            current_vision_pos_embeds=[_tokens(position)],
            feat_sizes=[tuple(image.shape[-2:])],
            output_dict={
                "cond_frame_outputs": self._conditioning,
                "non_cond_frame_outputs": self._followed,
            },
            num_frames=self._length,
            track_in_reverse=self._reverse,
        )

    def _decode(
        self,
        seen: torch.Tensor,
        embedding: Embedding,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        before: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """(predicted IoUs, low and high resolution mask, object pointer, object score)."""
        model = self._model
        inputs = None if points is None else {"point_coords": points[0], "point_labels": points[1]}
        _, _, iou, low, high, pointer, score = model._forward_sam_heads(
            backbone_features=seen,
            point_inputs=inputs,
            mask_inputs=before,
            high_res_features=high_resolution(embedding),
            multimask_output=model._use_multimask(False, inputs),
        )
        return iou, low, high, pointer, score

    def _remember(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        pointer: torch.Tensor,
        score: torch.Tensor,
        *,
        prompted: bool,
    ) -> dict[str, Any]:
        """What sam2 keeps of a slice, in the form that its memory attention reads; bfloat16 as upstream."""
        memory, position = self._model._encode_new_memory(
            current_vision_feats=[_tokens(image)],
            feat_sizes=[tuple(image.shape[-2:])],
            pred_masks_high_res=mask,
            object_score_logits=score,
            is_mask_from_pts=prompted,
        )
        return {
            "maskmem_features": memory.to(torch.bfloat16).to(self._storage),
            "maskmem_pos_enc": [p.to(self._storage) for p in position],
            "obj_ptr": pointer,
        }

    def _forget(self, k: int) -> None:
        """Drop what the slice after ``k`` does not look at any more."""
        model = self._model
        for n in list(self._followed):
            if abs(k - n) >= model.max_obj_ptrs_in_encoder - 1:
                del self._followed[n]
            elif abs(k - n) >= model.num_maskmem - 1:
                self._followed[n] = {"obj_ptr": self._followed[n]["obj_ptr"]}

    def _upsample(self, low: torch.Tensor) -> torch.Tensor:
        side = self._model.image_size
        return F.interpolate(low, (side, side), mode="bilinear", align_corners=False)


def high_resolution(embedding: Embedding) -> list[torch.Tensor]:
    """The finer features that the mask decoder adds, at strides 4 and 8."""
    return [embedding.features["high_res_feats_0"], embedding.features["high_res_feats_1"]]


def fill_holes(logits: torch.Tensor, area: int = HOLE) -> torch.Tensor:
    """Fill small holes with a weak logit of 0.1; sam2's own function needs a compiled CUDA extension.

    Args:
        logits: (1, 1, h, w) float32.
        area: Holes of up to this many pixels, 8-connected, are filled.

    Returns:
        (1, 1, h, w) float32, on the same device.
    """
    background = (logits[0, 0] <= 0).cpu().numpy()
    labels, _ = ndimage.label(background, np.ones((3, 3)))
    small = np.bincount(labels.ravel()) <= area
    small[0] = False
    return torch.where(torch.from_numpy(small[labels]).to(logits.device), 0.1, logits)


def _tokens(features: torch.Tensor) -> torch.Tensor:
    """(1, C, h, w) features as (h*w, 1, C) tokens."""
    return features.flatten(2).permute(2, 0, 1)
