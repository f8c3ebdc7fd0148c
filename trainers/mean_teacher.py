"""The trainer behind ``POST /train/mean_teacher``: accepted cases, and agreement on those without a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sam_infer.networks.unet import UnetModel
from trainers.basis import Basis, Parts
from trainers.data import Case, Datastore, unlabelled_cases
from trainers.options import number
from trainers.round import Plan, Round
from trainers.steps import mean_teacher_step
from trainers.unetrecipe import Trained, UnetRecipe

#: Long-run decay of the teacher, as SSL4MIS has it.
DECAY = 0.99


class MeanTeacherTrainer(UnetRecipe):
    """Mean teacher on probabilities, with ramp-up; see `trainers.steps.mean_teacher_step`.

    Args:
        basis: What it stands on.
    """

    def __init__(self, basis: Basis) -> None:
        super().__init__(
            basis,
            name="mean_teacher",
            description="Trains the U-Net on accepted cases and, by its own moving average, on open ones",
            warm=True,
        )

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {**super().config(), "consistency": 0.1}

    def _options(self, request: Any) -> dict[str, Any]:
        return {"consistency": number(request, "consistency", 0.1, low=0, high=1000)}

    def _missing(self, parts: Parts) -> list[str]:
        return super()._missing(parts) + ([] if parts.unlabelled else ["at least 1 case without a label"])

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        return [*parts.training, *unlabelled_cases(datastore, parts.unlabelled)]

    def _train(self, now: Round, start: UnetModel | None) -> Trained:
        store, settings = self.basis.slices(), now.plan.settings
        slices = store.load(now.parts.training)
        unlabelled = store.load(unlabelled_cases(now.datastore, now.parts.unlabelled))
        step = mean_teacher_step(
            slices,
            unlabelled,
            classes=len(self.basis.labels),
            batch=now.plan.batch,
            augment=self.basis.augmentation,
            weight=now.plan.options["consistency"],
        )
        run = now.train("training", self.network(start, settings.seed), step, replace(settings, ema=DECAY))
        facts = {"unlabelled_cases": len(now.parts.unlabelled)}
        return Trained(run=run, slices=len(slices) + len(unlabelled), facts=facts)
