"""Which parts of a Segment Anything learn: its decoder, low-rank products, adapters, or all of it.

``decoder``: the image encoder stays, the prompt encoder and the mask decoder learn; what is already embedded
stays valid. ``lora``: low-rank products in both (`sam_infer.tuning.lowrank`). ``adapter``: adapters in the
image encoder, and all of the prompt encoder and the mask decoder, as SAM-Med2D is trained (arXiv:2308.16184).
``full``: everything. A `Tuning` combines them otherwise. Low-rank products of rank 8 in the encoder are those
of Ward and Imran (SAM-Mix, arXiv:2412.08575); that the prompt encoder and the mask decoder learn entirely
beside them is known of the same authors' later code.

A network is prepared in place, learns, and gives what it learned (`learned_state`); the same base, prepared
the same way, takes that back (`load_learned`). `merge` makes it a network like any other, for serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sam_infer.tuning.adapters import adapters
from sam_infer.tuning.lowrank import adapt, fold, is_lowrank

Encoder = Literal["frozen", "lora", "adapter", "full"]
Decoder = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What of a Segment Anything learns.

    Args:
        encoder: Of the image encoder: nothing, low-rank products, adapters, or all of it.
        decoder: Low-rank products in the mask decoder, or all of the prompt encoder and the mask decoder.
        rank: Of the low-rank products.

    Raises:
        ValueError: When there is no such way.
    """

    encoder: Encoder = "frozen"
    decoder: Decoder = "full"
    rank: int = 8

    def __post_init__(self) -> None:
        for argument, ways in (("encoder", get_args(Encoder)), ("decoder", get_args(Decoder))):
            if getattr(self, argument) not in ways:
                raise ValueError(f"{argument} is one of {', '.join(ways)}, not {getattr(self, argument)!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank is a whole number from 1, not {self.rank!r}")

    def record(self) -> dict[str, Any]:
        """Plain JSON; ``Tuning(**record)`` gives it back."""
        return asdict(self)


METHODS: Mapping[str, Tuning] = {
    "decoder": Tuning(encoder="frozen", decoder="full"),
    "lora": Tuning(encoder="lora", decoder="lora"),
    "adapter": Tuning(encoder="adapter", decoder="full"),
    "full": Tuning(encoder="full", decoder="full"),
}


def prepare(sam: Any, tuning: Tuning, *, seed: int) -> None:
    """Let exactly what is told of a network learn, in place.

    Until it has learned something, it answers as before.

    Args:
        sam: A ``segment_anything.modeling.Sam``.
        tuning: What learns.
        seed: Of the numbers that added parameters start from; torch's own sequence of them stays as it is.

    Raises:
        ValueError: When the network has nothing of the kind that would learn, or still holds the low-rank
            products of an earlier preparation.
    """
    if is_lowrank(sam):
        raise ValueError("the network holds low-rank products already; merge it, or start from its base")
    sam.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        low = {"encoder": tuning.encoder == "lora", "decoder": tuning.decoder == "lora"}
        if any(low.values()):
            adapt(sam, rank=tuning.rank, **low)
        if tuning.encoder == "adapter":
            for adapter in adapters(sam.image_encoder):
                adapter.requires_grad_(True)
    if tuning.encoder == "full":
        sam.image_encoder.requires_grad_(True)
    if tuning.decoder == "full":
        sam.prompt_encoder.requires_grad_(True)
        sam.mask_decoder.requires_grad_(True)


def train_mode(network: nn.Module) -> None:
    """Put what learns entirely in training mode and the rest in evaluation mode.

    A batch normalisation that does not learn, such as those of MobileSAM's frozen encoder, then leaves its
    running statistics alone.

    Args:
        network: As `prepare` left it, or a module around it.
    """
    network.eval()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and all(one.requires_grad for one in parameters):
            module.train()


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that learn, and the statistics of layers whose parameters learn.

    Args:
        module: As `prepare` left it, or a module around it.

    Returns:
        Copies on the CPU, by their names in the module.
    """
    return {
        name: one.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, one in _learned(module)
    }


def load_learned(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `learned_state` gave.

    Args:
        module: The base the state was learned from, prepared the same way.
        state: Arrays by name.

    Raises:
        ValueError: When names or shapes are not those that learn here; the module is then as it was.
    """
    expected = dict(_learned(module))
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in expected]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(one.shape)}"
        for name, one in expected.items()
        if name in state and state[name].shape != one.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"what was learned does not fit this network: {', '.join(wrong[:3])}{more}")
    with torch.no_grad():
        for name, one in expected.items():
            one.copy_(state[name])


def merge(sam: Any) -> None:
    """Fold what was learned into a plain network, in place, for serving; nothing in it learns any more.

    Low-rank products become part of the weights, which have upstream's names again. Adapters stay modules.

    Args:
        sam: As `prepare` left it, trained or not.

    Raises:
        ValueError: When a low-rank product holds something that is not a number.
    """
    if is_lowrank(sam):
        fold(sam)
    sam.requires_grad_(False)


def _learned(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, not copies, of what `learned_state` gives."""
    kept = module.state_dict(keep_vars=True)
    for prefix, part in module.named_modules():
        own = [(name, one) for name, one in part.named_parameters(recurse=False) if one.requires_grad]
        statistics = part.named_buffers(recurse=False) if own else ()
        for name, tensor in (*own, *statistics):
            full = f"{prefix}.{name}" if prefix else name
            if full in kept:
                yield full, tensor
