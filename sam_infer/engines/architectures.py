"""The networks that checkpoints hold: how to build each, and how to tell them apart by their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network.

    Args:
        label: What it is called in messages.
        build: Makes it with random weights; None where its engine does.
    """

    label: str
    build: Callable[[], Any] | None = None


def _vit(variant: str) -> Callable[[], Any]:
    def build() -> Any:
        from segment_anything import sam_model_registry

        return sam_model_registry[variant](checkpoint=None)

    return build


def _mobile_sam() -> Any:
    from sam_infer.networks.tinyvit import TinyViT

    return _with_sams_decoder(TinyViT())


def _sam_med2d() -> Any:
    from sam_infer.networks.sammed2d import AdaptedEncoder

    return _with_sams_decoder(AdaptedEncoder())


def _sam_tiny() -> Any:
    from sam_infer.networks.samtiny import build_sam_tiny

    return build_sam_tiny()


def _with_sams_decoder(encoder: Any) -> Any:
    """A ``Sam`` of an image encoder of stride 16 and SAM's own prompt encoder and mask decoder."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    side, width = encoder.img_size, 256
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(side // 16, side // 16),
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=2048, num_heads=8),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )


VIT_B = Architecture(label="SAM ViT-B", build=_vit("vit_b"))
VIT_L = Architecture(label="SAM ViT-L", build=_vit("vit_l"))
VIT_H = Architecture(label="SAM ViT-H", build=_vit("vit_h"))
MOBILE_SAM = Architecture(label="MobileSAM", build=_mobile_sam)
SAM_MED2D = Architecture(label="SAM-Med2D", build=_sam_med2d)
SAM_TINY = Architecture(label="sam_tiny", build=_sam_tiny)
SAM2_TINY = Architecture(label="SAM 2.1 tiny")
SAM2_SMALL = Architecture(label="SAM 2.1 small")
SAM2_BASE_PLUS = Architecture(label="SAM 2.1 base+")
SAM2_LARGE = Architecture(label="SAM 2.1 large")

_VIT_BY_WIDTH = {768: VIT_B.label, 1024: VIT_L.label, 1280: VIT_H.label}
#: (width of the first block, number of blocks) -> size of a Hiera encoder.
_HIERA = {
    (96, 12): SAM2_TINY.label,
    (96, 16): SAM2_SMALL.label,
    (112, 24): SAM2_BASE_PLUS.label,
    (144, 48): SAM2_LARGE.label,
}
#: Names of parameters (a part of one, the first that fits counts) -> what holds them.
_OTHERS = {
    "mask_decoder.hf_": "SAM-HQ",
    "vision_encoder.backbone.": "SAM 2 in the format of Hugging Face's transformers",
    "vision_encoder.layers.": "SAM in the format of Hugging Face's transformers",
    "image_encoder.stem.": SAM_TINY.label,
    "detector.backbone.": "SAM 3",
    "encoder.stages.": "an nnU-Net or nnInteractive model",
}


def identify(state: State) -> str | None:
    """What a state dict looks like, by the names and shapes of its parameters; None = nothing known."""
    shape = {key: tuple(value.shape) for key, value in state.items()}
    if any(key.startswith("image_encoder.trunk.") for key in shape):
        return _sam2(shape)
    for part, label in _OTHERS.items():
        if any(part in key for key in shape):
            return label
    if "image_encoder.layers.0.blocks.0.conv1.c.weight" in shape:
        return MOBILE_SAM.label
    patches = shape.get("image_encoder.patch_embed.proj.weight", ())
    if len(patches) == 5:
        return "SAM-Med3D"
    if not patches:
        return None
    if any(".Adapter." in key for key in shape):
        return SAM_MED2D.label
    label = _VIT_BY_WIDTH.get(patches[0], f"a SAM ViT of width {patches[0]}")
    position = shape.get("image_encoder.pos_embed", (1, 64, 64))
    return label if position[1] == 64 else f"{label} at {16 * position[1]} px"


def _sam2(shape: Mapping[str, tuple[int, ...]]) -> str:
    blocks = {key.split(".")[3] for key in shape if key.startswith("image_encoder.trunk.blocks.")}
    width = shape.get("image_encoder.trunk.patch_embed.proj.weight", (0,))[0]
    label = _HIERA.get((width, len(blocks)), "a SAM 2 of another size")
    # 2.1 adds an embedding where an object is hidden (upstream: configs/sam2.1, no_obj_embed_spatial).
    return label if "no_obj_embed_spatial" in shape else label.replace("2.1", "2.0")
