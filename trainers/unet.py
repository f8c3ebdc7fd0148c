"""The trainer behind ``POST /train/unet``: accepted cases in, better weights out, or a reason why not."""

from __future__ import annotations

from sam_infer.networks.unet import UnetModel
from trainers.basis import Basis
from trainers.round import Round
from trainers.steps import supervised_step
from trainers.unetrecipe import Trained, UnetRecipe


class UnetTrainer(UnetRecipe):
    """Plain supervision: trains on what was accepted, and on nothing else.

    Args:
        basis: What it stands on.
    """

    def __init__(self, basis: Basis) -> None:
        super().__init__(
            basis,
            name="unet",
            description="Trains the U-Net on the accepted cases; publishes it only where it got better",
            warm=True,
        )

    def _train(self, now: Round, start: UnetModel | None) -> Trained:
        slices = self.basis.slices().load(now.parts.training)
        classes, augment = len(self.basis.labels), self.basis.augmentation
        step = supervised_step(slices, classes=classes, batch=now.plan.batch, augment=augment)
        run = now.train("training", self.network(start, now.plan.settings.seed), step)
        return Trained(run=run, slices=len(slices))
