"""How ``sam_tiny`` learns: encode an image once, decode its prompts, correct some of them in rounds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sam_infer.engines.checkpoint import fill, read_state
from sam_infer.networks.samtiny import SIDE, build_sam_tiny
from trainers.pretrain.loop import Plan, run
from trainers.pretrain.recipe import TinyRecipe
from trainers.pretrain.samtinyscenes import Scenes, SceneSampler
from trainers.samrounds import Asked, corrected, decode, losses

#: Corrective rounds of a step, drawn with equal chances.
_CORRECTIONS = (1, 1, 2, 2, 4)


def train_sam_tiny(
    sampler: SceneSampler, recipe: TinyRecipe, plan: Plan
) -> tuple[dict[str, Tensor], list[float]]:
    """Train ``sam_tiny`` until the plan's end; see `trainers.pretrain.loop.run`.

    Args:
        sampler: Gives the scenes of a step.
        recipe: Optimiser's numbers.
        plan: Length, place and device.

    Returns:
        The averaged weights by name, and the losses of the steps of this call.
    """
    return run(_Learner(recipe, plan), sampler, recipe, plan)


class _Learner:
    """The network and its rounds of prompts.

    Args:
        recipe: How many prompts are corrected.
        plan: Seed, device and start.
    """

    def __init__(self, recipe: TinyRecipe, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        network = build_sam_tiny()
        if plan.start is not None:
            fill(network, read_state(plan.start), name=plan.start.name, label="sam_tiny")
        self.network = network.to(plan.device)
        self.network.image_encoder.to(memory_format=torch.channels_last)
        self.recipe, self.plan = recipe, plan

    def learn(self, batch: Scenes, step: int) -> float:
        """Every round has its own backward pass down to the embeddings, so that memory does not grow.

        The encoder's backward pass comes once, at the end.
        """
        scenes, recipe = batch.to(self.plan.device), self.recipe
        rng = np.random.default_rng([self.plan.seed, 14, step])
        narrow = torch.autocast(
            torch.device(self.plan.device).type, torch.bfloat16, enabled=self.plan.bfloat16
        )
        image = scenes.image.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with narrow:
            features = self.network.image_encoder(image)
        leaf = features.detach().requires_grad_()
        asked = first_asked(scenes)
        objects, total = len(asked.truth), 0.0
        for round_ in range(1 + int(rng.choice(_CORRECTIONS))):
            with narrow:
                masks, iou = decode(self.network, leaf, asked)
            wrong, logits = losses(masks, iou, asked)
            loss = wrong.sum() / objects
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            if round_ == 0:
                starts = range(0, objects, recipe.prompts)
                keep = [n + rng.permutation(recipe.prompts)[: recipe.corrected] for n in starts]
                index = torch.from_numpy(np.concatenate(keep)).to(leaf.device)
                asked, logits = asked.select(index), logits[index]
            asked = corrected(asked, logits, rng, side=SIDE)
        features.backward(leaf.grad)
        return total

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


def first_asked(scenes: Scenes) -> Asked:
    """The prompts of a batch, image by image, before any correction."""
    images, count = scenes.truth.shape[:2]
    truth = scenes.truth.flatten(0, 1)
    return Asked(
        owner=torch.arange(images, device=truth.device).repeat_interleave(count),
        truth=truth, box=scenes.box.flatten(0, 1), clicks=truth.new_zeros(len(truth), 0, 3),
        first=scenes.click.flatten(0, 1), previous=scenes.previous.flatten(0, 1),
    )  # fmt: skip
