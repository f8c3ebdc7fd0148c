"""The trainer behind ``POST /train/cam_classifier``: what is on a slice, from image-level labels alone.

An accepted mask says of each slice what is on it, and so does a table of image-level labels
(`trainers.imagelabels`), which takes no drawing at all: images with a table row and no accepted mask are
trained on too. Where an image has both, the mask is believed. Held-out cases are judged by their masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam_infer.networks.classifier import (
    CHANNELS,
    ClassifierModel,
    build_classifier,
    load_classifier,
    save_classifier,
)
from trainers.basis import Basis, Parts
from trainers.camscore import box_quality, presence_score
from trainers.data import Case, Datastore
from trainers.evaluate import Score
from trainers.labelledcases import LabelledCases, count_told
from trainers.modelrecipe import NetworkRecipe, Trained
from trainers.presence import presence_slices, presence_step
from trainers.round import Plan, Round


class CamClassifierTrainer(NetworkRecipe[ClassifierModel]):
    """Trains the classifier whose activation maps prompt SAM (`sam_infer.autocam`).

    It is judged by its balanced accuracy per slice. The statistics also say how well the boxes of its maps
    fit (`trainers.camscore.box_quality`): that decides whether SAM can be prompted by them.

    Args:
        basis: What it stands on.
        csv: A table of image-level labels; None = accepted masks alone.
        channels: Features of the network's four stages.
    """

    def __init__(
        self, basis: Basis, *, csv: Path | None = None, channels: tuple[int, ...] = CHANNELS
    ) -> None:
        super().__init__(
            basis,
            name="cam_classifier",
            served="cam",
            description="Trains a classifier of what is on a slice; its activation maps prompt SAM",
            warm=True,
        )
        self._labelled = LabelledCases(basis=basis, csv=csv)
        self._channels = channels

    def build(self) -> Any:
        """An untrained network; whoever calls it sets the seed."""
        return build_classifier(labels=len(self.basis.labels), channels=self._channels)

    def model(self, network: Any, training: Mapping[str, Any]) -> ClassifierModel:
        """A network with what using it needs."""
        return ClassifierModel(
            network=network.requires_grad_(False),
            labels=self.basis.labels,
            size=self.basis.size,
            channels=self._channels,
            window=self.basis.window,
            training=training,
        )

    def precheck(self, datastore: Datastore) -> None:
        """Whether there is enough to train on.

        Raises:
            InputError: (409) With what is missing and which cases to accept next; (422) when the table of
                image-level labels cannot be used.
        """
        self._labelled.check(datastore)
        super().precheck(datastore)

    def _missing(self, parts: Parts) -> list[str]:
        told = self._labelled.told(parts)
        return [] if len(parts.training) + len(told) >= self.basis.minimum else super()._missing(parts)

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._options(request), **self._labelled.options()}

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        return [one.case for one in self._labelled.find(parts, datastore)]

    def _train(self, now: Round, start: ClassifierModel | None) -> Trained:
        cases = self._labelled.find(now.parts, now.datastore)
        slices = presence_slices(self.basis.slices(), cases)
        step = presence_step(slices, batch=now.plan.batch, augment=self.basis.augmentation)
        run = now.train("training", self.network(start, now.plan.settings.seed), step)
        return Trained(run=run, slices=len(slices), facts={"csv_cases": count_told(cases)})

    def _load(self, path: Path, device: str) -> ClassifierModel:
        return load_classifier(path, device=device)

    def _save(self, path: Path, model: ClassifierModel) -> None:
        save_classifier(path, model)

    def _continues(self, model: ClassifierModel, plan: Plan) -> bool:
        return model.channels == self._channels

    def _score(self, model: ClassifierModel, parts: Parts) -> Score:
        return presence_score(model, parts.held_out, window_for=self.basis.window_for, read=self.basis.read)

    def _figures(self, candidate: ClassifierModel, parts: Parts) -> dict[str, Any]:
        return box_quality(candidate, parts.held_out, window_for=self.basis.window_for, read=self.basis.read)
