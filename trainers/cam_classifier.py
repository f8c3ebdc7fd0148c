"""The trainer behind ``POST /train/cam_classifier``: what is on a slice, from image-level labels alone.

An accepted mask says of each slice what is on it, and so does a table of image-level labels
(`trainers.imagelabels`), which takes no drawing at all: images with a table row and no accepted mask are
trained on too. Where an image has both, the mask is believed. Held-out cases are judged by their masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from trainers.data import Case, Datastore, accepted_cases, unlabelled_cases
from trainers.evaluate import Score
from trainers.imagelabels import ImageLabels, check_images, read_image_labels, slice_labels
from trainers.modelrecipe import NetworkRecipe, Trained
from trainers.presence import LabelledCase, presence_slices, presence_step
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
        self._csv = csv
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
        if self._csv is not None:
            known = {case.case_id for case in accepted_cases(datastore)}
            check_images(self._table(), known | set(datastore.get_unlabeled_images()), path=self._csv)
        super().precheck(datastore)

    def _table(self) -> dict[str, ImageLabels]:
        return {} if self._csv is None else read_image_labels(self._csv, labels=self.basis.labels)

    def _missing(self, parts: Parts) -> list[str]:
        told = set(self._table()) & set(parts.unlabelled)
        return [] if len(parts.training) + len(told) >= self.basis.minimum else super()._missing(parts)

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        # Not for the client to set: a killed round goes on only where the table is as it was.
        return {} if self._csv is None else {"csv": hashlib.sha256(repr(self._table()).encode()).hexdigest()}

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        return [one.case for one in self._labelled(parts, datastore)]

    def _labelled(self, parts: Parts, datastore: Datastore) -> list[LabelledCase]:
        """The cases to train on, with what is known of those without an accepted mask."""
        found = [LabelledCase(case=case) for case in parts.training]
        if self._csv is None:
            return found
        table = self._table()
        for case in unlabelled_cases(datastore, [name for name in parts.unlabelled if name in table]):
            depth = self.basis.read(case.image).shape[2]
            slices, every = slice_labels(table[case.case_id], depth=depth, path=self._csv)
            if slices:
                named = replace(case, slices=tuple(sorted(slices)))
                found.append(LabelledCase(case=named, slices=slices))
            if every:
                found.append(LabelledCase(case=case, slices=slices, every=every))
        return found

    def _train(self, now: Round, start: ClassifierModel | None) -> Trained:
        cases = self._labelled(now.parts, now.datastore)
        slices = presence_slices(self.basis.slices(), cases)
        step = presence_step(slices, batch=now.plan.batch, augment=self.basis.augmentation)
        run = now.train("training", self.network(start, now.plan.settings.seed), step)
        told = {one.case.case_id for one in cases if one.case.label is None}
        return Trained(run=run, slices=len(slices), facts={"csv_cases": len(told)})

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
