"""How the bundled network learns: crops, and some of them again with one more corrective click."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sam_infer.networks.promptchannels import CropBatch, prompt_channels
from sam_infer.networks.promptnet import PromptNet
from trainers.pretrain.correct import corrected
from trainers.pretrain.loop import Plan, run
from trainers.pretrain.recipe import Recipe
from trainers.pretrain.sampler import Drawn, Sampler, stack


def train(sampler: Sampler, recipe: Recipe, plan: Plan) -> tuple[dict[str, Tensor], list[float]]:
    """Train the bundled network until the plan's end; see `trainers.pretrain.loop.run`.

    Args:
        sampler: Gives ``recipe.batch - recipe.corrected`` crops a step.
        recipe: Optimiser's numbers.
        plan: Length, place and device. The file that it starts from may hold a shallower network
            (`PromptNet.grow_from`).

    Returns:
        The averaged weights by name, and the losses of the steps of this call.
    """
    return run(_Learner(recipe, plan), sampler, recipe, plan)


class _Learner:
    """The network and the crops that come back.

    Args:
        recipe: How many crops come back.
        plan: Seed, device and start.
    """

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        network = PromptNet()
        if plan.start is not None:
            network.grow_from({name: value.float() for name, value in load_file(plan.start).items()})
        self.network = network.to(plan.device)
        self.recipe, self.plan = recipe, plan
        self.carried: Drawn | None = None

    def learn(self, batch: Drawn, step: int) -> float:
        device = self.plan.device
        if self.carried is not None:
            batch = stack([batch, self.carried])
        on = Drawn(crops=batch.crops.to(device), truth=batch.truth.to(device), beyond=batch.beyond.to(device))
        inputs = prompt_channels(on.crops)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.plan.bfloat16):
            logits, iou = self.network(inputs)
        loss = loss_of(logits, iou.float(), on)
        loss.backward()  # type: ignore[no-untyped-call]
        rng = np.random.default_rng([self.plan.seed, 4, step])
        self.carried = corrected(batch, logits.detach().cpu(), self.recipe.corrected, rng)
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        return _pack(self.carried)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.carried = _unpack(state)


def loss_of(logits: Tensor, iou: Tensor, batch: Drawn) -> Tensor:
    """2 BCE + Dice + squared error of the predicted IoU, mean over crops.

    Args:
        logits: (B, S, S) float32, > 0 is foreground.
        iou: (B,) float32 in 0..1, predicted.
        batch: Truths on the same device.
    """
    truth = batch.truth
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    share = torch.sigmoid(logits)
    both, total = (share * truth).sum((1, 2)), share.sum((1, 2)) + truth.sum((1, 2))
    dice = 1 - (2 * both + 1) / (total + 1)
    with torch.no_grad():
        mask = logits > 0
        common = (mask * truth).sum((1, 2))
        real = common / (mask.sum((1, 2)) + truth.sum((1, 2)) + batch.beyond - common).clamp_min(1)
    return (2 * entropy + dice + (iou - real).square()).mean()


def _pack(drawn: Drawn | None) -> dict[str, Tensor]:
    if drawn is None:
        return {}
    return {**vars(drawn.crops), "truth": drawn.truth, "beyond": drawn.beyond}


def _unpack(packed: dict[str, Tensor]) -> Drawn | None:
    if not packed:
        return None
    packed = {name: value.cpu() for name, value in packed.items()}
    truth, beyond = packed.pop("truth"), packed.pop("beyond")
    return Drawn(crops=CropBatch(**packed), truth=truth, beyond=beyond)
