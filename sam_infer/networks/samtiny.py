"""A small Segment Anything: its own prompt encoder and mask decoder over a small encoder.

Everything outside the image encoder is segment-anything's own class (Kirillov et al., Segment Anything,
ICCV 2023, arXiv:2304.02643), so that what works on a SAM (its tokens, its image embedding, adapters on
``image_encoder.blocks.N.attn.qkv`` or on the decoder's ``q_proj`` and ``v_proj``) works on this one.
"""

from __future__ import annotations

import math

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import Block
from torch import Tensor, nn

SIDE = 256
STRIDE = 8
DIM = 96
PIXEL_MEAN, PIXEL_STD = 90.0, 70.0
_FINE, _COARSE, _DEPTH, _HEADS = 64, 192, 4, 6


class SamTinyEncoder(nn.Module):
    """Convolutions down to stride 8, transformer blocks at stride 16, both joined at stride 8.

    Convolutions keep the edges, which a mask needs; the blocks see the whole image. The blocks are
    segment-anything's own, without windows (16 x 16 tokens).
    """

    def __init__(self) -> None:
        super().__init__()
        self.img_size = SIDE
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, _FINE, 3, padding=1))
        self.fine = nn.Sequential(_Residual(_FINE), _Residual(_FINE))
        self.down = nn.Conv2d(_FINE, DIM, 2, 2)
        self.middle = nn.Sequential(_Residual(DIM), _Residual(DIM))
        self.patch_embed = nn.Conv2d(DIM, _COARSE, 2, 2)
        tokens = SIDE // (2 * STRIDE)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, tokens, _COARSE))
        self.blocks = nn.ModuleList(Block(_COARSE, _HEADS) for _ in range(_DEPTH))
        self.up = nn.Sequential(LayerNorm2d(_COARSE), nn.Conv2d(_COARSE, 4 * DIM, 1), nn.PixelShuffle(2))
        self.skip = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * _FINE, DIM, 1))
        self.join = _Residual(DIM)
        self.neck = nn.Sequential(
            nn.Conv2d(DIM, DIM, 1, bias=False), LayerNorm2d(DIM),
            nn.Conv2d(DIM, DIM, 3, padding=1, bias=False), LayerNorm2d(DIM),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Embed images.

        Args:
            x: (B, 3, 256, 256) float32, normalised and padded by ``Sam.preprocess``; colour becomes its
                mean.

        Returns:
            (B, 96, 32, 32).
        """
        fine = self.fine(self.stem(x.mean(1, keepdim=True)))
        middle = self.middle(self.down(fine))
        tokens = self.patch_embed(middle).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        wide = self.up(tokens.permute(0, 3, 1, 2))
        out: Tensor = self.neck(self.join(middle + wide + self.skip(fine)))
        return out


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.two.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.two(nn.functional.gelu(self.one(self.norm(x))))
        return out


def build_sam_tiny() -> Sam:
    """The model with random weights, a ``segment_anything.modeling.Sam`` in training mode.

    The positional encoding's frequencies lie along the axes, from a tenth to one and a half, where
    segment-anything draws their directions and sizes at random. Left of, right of, above and below a box's
    side are then sums of few of them, and a new decoder learns what a box is in half the steps.
    """
    model = Sam(
        image_encoder=SamTinyEncoder(),  # type: ignore[arg-type]
        prompt_encoder=PromptEncoder(
            embed_dim=DIM, image_embedding_size=(SIDE // STRIDE,) * 2, input_image_size=(SIDE, SIDE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=3, mlp_dim=4 * DIM),
            num_multimask_outputs=3, activation=nn.ReLU, iou_head_hidden_dim=DIM,
        ),
        pixel_mean=[PIXEL_MEAN] * 3, pixel_std=[PIXEL_STD] * 3,
    )  # fmt: skip
    frequencies = torch.logspace(math.log10(0.1), math.log10(1.5), DIM // 4)
    matrix = model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.zero_()
    matrix[0, 0::2] = matrix[1, 1::2] = frequencies
    return model
