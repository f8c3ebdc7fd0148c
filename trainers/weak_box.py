"""The trainer behind ``POST /train/weak_box``: the clinician draws boxes, SAM fills them, a U-Net learns.

Häkkinen et al., Medical Image Segmentation with SAM-generated Annotations, arXiv:2409.20253. Network, loss
and schedule of the paper are not known to us; these are the ones that all trainers of this project share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_infer.boxed import masks_from_boxes
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.networks.unet import UnetModel
from sam_infer.volumes import file_key
from trainers.basis import Basis, Parts
from trainers.boxes import Boxes, BoxStore
from trainers.data import Case, Datastore, unlabelled_cases
from trainers.options import flag
from trainers.proposals import keep_proposal, kept_proposal
from trainers.round import Plan, Round
from trainers.steps import supervised_step
from trainers.unetrecipe import Trained, UnetRecipe


class WeakBoxTrainer(UnetRecipe):
    """Trains on masks that an engine made of boxes; on slices that hold a box only.

    A slice with a box counts as labelled through and through: what no box holds there is background.

    Args:
        basis: What it stands on.
        encoder: The promptable engine behind its caches.
        boxes: The boxes.
    """

    def __init__(self, basis: Basis, *, encoder: SliceEncoder, boxes: BoxStore) -> None:
        super().__init__(
            basis,
            name="weak_box",
            description="Trains a U-Net on masks that the promptable engine makes of boxes",
            warm=False,
        )
        self._encoder = encoder
        self._boxes = boxes

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {**super().config(), "include_accepted": False}

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        engine = self._encoder.engine.fingerprint
        return {"include_accepted": flag(request, "include_accepted", False), "engine": engine}

    def _missing(self, parts: Parts) -> list[str]:
        known = [*parts.unlabelled, *(c.case_id for c in parts.training)]
        found = len(self._boxed(known))
        if found >= self.basis.minimum:
            return []
        return [
            f"boxes on at least {self.basis.minimum} cases for training, {found} have some "
            "(PUT /datastore/boxes, or store_boxes with a box in sam_click_2d or sam_click_3d)"
        ]

    def _boxed(self, names: Sequence[str]) -> dict[str, Boxes]:
        """The boxes of those cases that have any of the project's labels."""
        having = set(self._boxes.ids())
        found = {name: self._boxes.get(name) for name in sorted(names) if name in having}
        return {
            name: boxes
            for name, boxes in found.items()
            if boxes is not None and any(boxes.labels.get(label) for label in self.basis.labels)
        }

    def _cases(self, parts: Parts, datastore: Datastore) -> list[tuple[Case, Boxes]]:
        accepted = {c.case_id: replace(c, label=None) for c in parts.training}
        boxed = self._boxed([*parts.unlabelled, *accepted])
        unlabelled = unlabelled_cases(datastore, [name for name in boxed if name not in accepted])
        known = {**accepted, **{c.case_id: c for c in unlabelled}}
        return [(known[name], boxes) for name, boxes in boxed.items() if name in known]

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        accepted = parts.training if plan.options["include_accepted"] else []
        return [*accepted, *(case for case, _ in self._cases(parts, datastore))]

    def _train(self, now: Round, start: UnetModel | None) -> Trained:
        given = self._cases(now.parts, now.datastore)
        boxes = {case.case_id: found for case, found in given}
        cases = [
            self._filled(case, boxes[case.case_id], now)
            for case in now.counted("masks from boxes", [case for case, _ in given])
        ]
        count = len(cases)
        if now.plan.options["include_accepted"]:
            cases += now.parts.training
        slices = self.basis.slices().load(cases)
        classes, augment = len(self.basis.labels), self.basis.augmentation
        step = supervised_step(slices, classes=classes, batch=now.plan.batch, augment=augment)
        run = now.train("training", self.network(start, now.plan.settings.seed), step)
        return Trained(run=run, slices=len(slices), facts={"boxed_cases": count, "tag": self.name})

    def _filled(self, case: Case, boxes: Boxes, now: Round) -> Case:
        """A case with the masks of its boxes, kept in the store until engine or boxes change."""
        labels = self.basis.labels
        regions = {v: boxes.labels[name] for name, v in labels.items() if boxes.labels.get(name)}
        record = {name: found for name, found in boxes.record()["boxes"].items() if name in labels}
        settings = (
            now.plan.options["engine"],
            file_key(case.image),
            self.basis.window,
            sorted(record.items()),
        )
        key = hashlib.sha256(repr(settings).encode()).hexdigest()
        slices = tuple(sorted({k for found in regions.values() for r in found for k in r.slices}))
        known = self._known(case, now, key)
        if known is None:
            image = self.basis.read(case.image)
            self._check(case, image.shape, boxes)
            window = self.basis.window_for(image, {})
            filled = masks_from_boxes(image, regions, encoder=self._encoder, window=window)
            names = {value: name for name, value in labels.items()}
            keep_proposal(
                now.datastore,
                case.case_id,
                filled.labelmap,
                image,
                tag=self.name,
                labels=labels,
                provenance={
                    "trainer": self.name,
                    "key": key,
                    "engine": self._encoder.engine.name,
                    "boxes": record,
                    "who": boxes.who,
                    "scores": {names[v]: round(score, 4) for v, score in filled.scores.items()},
                },
            )
            known = self._known(case, now, key)
        return replace(case, label=known, slices=slices)

    def _known(self, case: Case, now: Round, key: str) -> Path | None:
        return kept_proposal(now.datastore, case.case_id, tag=self.name, key=key)

    def _check(self, case: Case, shape: tuple[int, int, int], boxes: Boxes) -> None:
        """Refuse boxes of an image that was replaced by a smaller one since."""
        for label, regions in boxes.labels.items():
            for region in regions:
                if any(high >= side for high, side in zip(region.high, shape, strict=True)):
                    remedy = f"lies outside {case.case_id} of shape {shape}; draw it again"
                    raise InputError(f"boxes of {label}", region.bounds, remedy, status=409)
