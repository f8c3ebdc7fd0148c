"""SAM 2 networks with random weights, far enough from the initial ones that every part has an effect."""

from __future__ import annotations

from pathlib import Path

import torch

from sam_infer.engines.sam2model import build_sam2

#: An eighth of the real side, so that tests are fast.
SIDE = 128


def random_sam2(name="sam2.1_tiny", *, side: int | None = SIDE, seed: int = 0):
    """A ``SAM2Base`` in eval mode that sees an object on every slice and draws masks of some pixels."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_sam2(name, side=side).eval()
        for key, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.1)
            elif "pos_embed" in key or "no_" in key or "tpos" in key:
                value.normal_(0, 0.5)
        for block in model.memory_encoder.fuser.layers:
            block.gamma.fill_(1.0)
        for layer in model.memory_attention.layers:
            for part, factor in (("q_proj", 5), ("k_proj", 5), ("v_proj", 3), ("out_proj", 3)):
                getattr(layer.cross_attn_image, part).weight.mul_(factor)
        for head in model.sam_mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight.mul_(30)
            head.layers[-1].bias.mul_(30)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(100.0)
    return model


def save_random_sam2(path: Path, name="sam2.1_tiny") -> Path:
    """Write a checkpoint file as sam2's authors do, with random weights."""
    torch.save({"model": random_sam2(name, side=None).state_dict()}, path)
    return path
