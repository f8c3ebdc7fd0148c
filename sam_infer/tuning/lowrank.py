"""Low-rank adaptation of a Segment Anything's queries and values, with the peft library.

Hu et al., LoRA, arXiv:2106.09685: a projection W learns a product B A of small rank beside it, W x + s B A x,
with B = 0 to begin with. As in Zhang and Liu (SAMed, arXiv:2304.13785), the queries and values of every
attention of the image encoder are adapted, A is drawn as a linear layer's weights are, and nothing weighs the
product: s = 1. That the same is done to every attention of the mask decoder is this project's own choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sam_infer.tuning.splitqkv import join, split


def is_lowrank(network: nn.Module) -> bool:
    """Whether something of a network is adapted and not yet folded into its weights."""
    return any(".lora_" in name for name, _ in network.named_parameters())


def adapt(sam: Any, *, rank: int, encoder: bool, decoder: bool) -> None:
    """Put low-rank products beside projections, in place; nothing but them learns afterwards.

    Args:
        sam: A ``segment_anything.modeling.Sam``.
        rank: Of the products.
        encoder: Whether the image encoder's attention is adapted.
        decoder: Whether the mask decoder's is.

    Raises:
        ValueError: When a part that is told has no attention whose projections are known.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted: set[nn.Module] = set()
    if decoder:
        named = sam.mask_decoder.named_modules()
        wanted |= _some(
            (one for name, one in named if name.endswith((".q_proj", ".v_proj"))), sam.mask_decoder
        )
    if encoder:
        packed = split(sam.image_encoder)
        wanted |= _some((one for qkv in packed for one in (qkv.q, qkv.v)), sam.image_encoder)
    names = [name for name, module in sam.named_modules() if module in wanted]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=names)
    inject_adapter_in_model(config, sam)
    del sam.peft_config  # peft's note to itself; the layers do not read it


def fold(sam: Any) -> None:
    """Undo `adapt`, in place, with what was learned added to the weights."""
    from peft.tuners.lora import LoraLayer

    for parent in list(sam.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge(safe_merge=True)  # type: ignore[operator]  # not a number is an error
                setattr(parent, name, child.get_base_layer())
    join(sam)


def _some(found: Iterable[nn.Module], part: nn.Module) -> set[nn.Module]:
    modules = set(found)
    if not modules:
        raise ValueError(f"{type(part).__name__} has no queries and values that low-rank adaptation knows")
    return modules
