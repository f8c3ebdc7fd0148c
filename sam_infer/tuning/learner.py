"""A Segment Anything while it learns, and while what it learned is read back: the network with its extras."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sam_infer.tuning.extras import ExtraPrompts
from sam_infer.tuning.methods import Tuning, learned_state, load_learned, merge, prepare, train_mode


class SamLearner(nn.Module):
    """A copy of a SAM in which what a tuning names learns, and everything else stands still.

    The parameters of an encoder that stands still lie where the base's own do, so they are in memory once; a
    learner that goes to another device takes copies there, and the base stays where it is.

    Args:
        base: The ``segment_anything.modeling.Sam``; its numbers are not changed.
        tuning: What learns.
        seed: Of the parameters that are added.
        text: Length of embedded texts that it learns to be prompted with; None = none.
        attention: Whether it learns to be prompted with attention.
    """

    def __init__(
        self, base: Any, *, tuning: Tuning, seed: int = 0, text: int | None = None, attention: bool = False
    ) -> None:
        super().__init__()
        still = base.image_encoder if tuning.encoder == "frozen" else nn.Module()
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in still.parameters()}
        self.sam = copy.deepcopy(base, shared)
        self.tuning = tuning
        prepare(self.sam, tuning, seed=seed)
        self.extras: ExtraPrompts | None = None
        if text is not None or attention:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                width = self.sam.prompt_encoder.embed_dim
                self.extras = ExtraPrompts(width=width, text=text, attention=attention)
        self._names = tuple(learned_state(self))

    def train(self, mode: bool = True) -> SamLearner:
        """As usual; what stands still stays in evaluation mode."""
        super().train(mode)
        if mode:
            train_mode(self.sam)
        return self

    def learned(self) -> dict[str, Tensor]:
        """What learned, by name, on the CPU."""
        state = self.state_dict()
        return {name: state[name].detach().cpu().clone() for name in self._names}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `learned` gave.

        Raises:
            ValueError: When it is not the state of a learner of this tuning.
        """
        load_learned(self, state)

    def served(self) -> Any:
        """The network for use, in evaluation mode: itself, or a copy with low-rank products folded in."""
        if self.tuning.encoder != "lora" and self.tuning.decoder != "lora":
            return self.sam.eval()
        merged = copy.deepcopy(self.sam)
        merge(merged)
        return merged.eval()
