"""SAM 2 networks of the package sam2, built from its own configuration files and filled from checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sam_infer.engines import architectures
from sam_infer.engines.architectures import Architecture
from sam_infer.engines.checkpoint import load_network
from sam_infer.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One network.

    Args:
        architecture: What its checkpoints hold.
        config: Configuration file in sam2's folder ``configs/sam2.1``, without its ending.
        side: Side in pixels of the square image that the network reads.
    """

    architecture: Architecture
    config: str
    side: int = 1024


#: Registry name -> network. MedSAM2 (Ma et al. 2025, arXiv:2504.03600) is SAM 2.1 tiny at 512 pixels.
VARIANTS = {
    "sam2.1_tiny": Variant(architecture=architectures.SAM2_TINY, config="sam2.1_hiera_t"),
    "sam2.1_small": Variant(architecture=architectures.SAM2_SMALL, config="sam2.1_hiera_s"),
    "sam2.1_base_plus": Variant(architecture=architectures.SAM2_BASE_PLUS, config="sam2.1_hiera_b+"),
    "sam2.1_large": Variant(architecture=architectures.SAM2_LARGE, config="sam2.1_hiera_l"),
    "medsam2": Variant(architecture=architectures.SAM2_TINY, config="sam2.1_hiera_t", side=512),
}
#: Pixels of the image per cell of the feature map that memory attends to.
STRIDE = 16


def build_sam2(name: str, *, side: int | None = None) -> Any:
    """Build a ``sam2.modeling.sam2_base.SAM2Base`` with random weights.

    The settings are those of sam2's ``build_sam2_video_predictor``. Its configuration file is read directly,
    so that Hydra's global state, which other code in the process may use, is neither needed nor changed.

    Args:
        name: One of `VARIANTS`.
        side: Side in pixels of the image that the network reads, a multiple of 128; None = the variant's own.

    Raises:
        InputError: When the name is unknown.
    """
    import sam2
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    variant = _variant(name)
    side = side or variant.side
    loaded: Any = OmegaConf.load(Path(sam2.__path__[0], "configs", "sam2.1", f"{variant.config}.yaml"))
    config = loaded.model
    config.image_size = side
    layer = config.memory_attention.layer
    for attention in (layer.self_attention, layer.cross_attention):
        attention.feat_sizes = [side // STRIDE, side // STRIDE]
    config.sam_mask_decoder_extra_args = {
        "dynamic_multimask_via_stability": True,
        "dynamic_multimask_stability_delta": 0.05,
        "dynamic_multimask_stability_thresh": 0.98,
    }
    config.binarize_mask_from_pts_for_mem_enc = True
    return instantiate(config, _convert_="all")


def load_sam2(name: str, weights: Path) -> Any:
    """Build a network and fill it from a checkpoint file.

    Args:
        name: One of `VARIANTS`.
        weights: Checkpoint file; see `sam_infer.engines.checkpoint.read_state`.

    Raises:
        InputError: When the name is unknown or the file is not a checkpoint of that network.
    """
    return load_network(weights, architecture=_variant(name).architecture, build=partial(build_sam2, name))


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise InputError("engine", name, f"SAM 2 variants are {', '.join(VARIANTS)}")
    return VARIANTS[name]
