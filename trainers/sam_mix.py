"""The trainer behind ``POST /train/sam_mix``: a classifier and the SAM that it prompts, learned together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sam_infer.autocam import CamOptions, auto_cam
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine
from sam_infer.geometry import slice_image
from sam_infer.networks.classifier import CHANNELS, build_classifier
from sam_infer.prompts.activation import THRESHOLD
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import Tuning
from sam_infer.tuning.mixfile import MixModel, MixNetwork, load_mix, save_mix
from sam_infer.types import Prompts
from sam_infer.volumes import read_labelmap
from trainers.basis import Basis, Parts
from trainers.camscore import box_quality, presence_score
from trainers.data import Case, Datastore
from trainers.evaluate import Score, dice_per_label, summarize
from trainers.labelledcases import LabelledCases, count_told
from trainers.mixsteps import SEGMENTATION_WEIGHT, MixView, mix_step
from trainers.modelrecipe import Trained
from trainers.options import devices, number
from trainers.presence import presence_slices
from trainers.round import Plan, Round
from trainers.samrecipe import SamBased, no_objects
from trainers.samviews import HALF, given_view
from trainers.slicestore import choose_slices


class SamMixTrainer(SamBased[MixModel]):
    """Trains a classifier of what is on a slice and a SAM whose prompts its activation maps are.

    After Ward and Imran (SAM-Mix, arXiv 2412.08575): few masks, and image-level labels for many images more.
    ``method`` "lora" is theirs, low-rank products in the image encoder; with "decoder" the encoder stands
    still, and each slice is encoded once: this project's own choice, and the default, for machines without a
    GPU. SAM sees whole slices, and masks for any of the project's labels.

    It is judged by Dice of the label maps that it makes by itself on the held-out cases: boxes are those of
    the activation maps, as when it is used. The statistics also say the balanced accuracy of presence, and
    how well the boxes fit (`trainers.camscore.box_quality`).

    Args:
        basis: What it stands on.
        base: The SAM that is tuned; it is never changed.
        store: Embeddings of the base on disk; None = they are made again each time.
        csv: A table of image-level labels (`trainers.imagelabels`); None = accepted masks alone.
        channels: Features of the classifier's four stages.
    """

    methods: Mapping[str, Tuning] = {
        "lora": Tuning(encoder="lora", decoder="full"),
        "decoder": Tuning(encoder="frozen", decoder="full"),
    }

    def __init__(
        self,
        basis: Basis,
        *,
        base: SamEngine,
        store: EmbeddingStore | None = None,
        csv: Path | None = None,
        channels: tuple[int, ...] = CHANNELS,
    ) -> None:
        super().__init__(
            basis,
            base=base,
            store=store,
            name="sam_mix",
            served="mix",
            description="Trains a classifier of what is on a slice together with the SAM that it prompts",
        )
        self._labelled = LabelledCases(basis=basis, csv=csv)
        self._channels = channels

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {
            **super().config(),
            # Low-rank products in the encoder take seconds a step on a CPU.
            "method": sorted(self.methods, reverse=devices()[0] == "cuda"),
            "iterations": self.basis.iterations,
            "learning_rate": 0.001,
            "segmentation_weight": SEGMENTATION_WEIGHT,
            "cam_threshold": THRESHOLD,
        }

    def precheck(self, datastore: Datastore) -> None:
        """Whether there is enough to train on.

        Raises:
            InputError: (409) With what is missing and which cases to accept next; (422) when the table of
                image-level labels cannot be used.
        """
        self._labelled.check(datastore)
        super().precheck(datastore)

    def _missing(self, parts: Parts) -> list[str]:
        told = self._labelled.told(parts) if parts.training else ()
        return [] if len(parts.training) + len(told) >= self.basis.minimum else super()._missing(parts)

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config()

        def between(name: str, low: float, high: float) -> float:
            return number(request, name, config[name], low=low, high=high)

        return {
            **super()._options(request),
            "segmentation_weight": between("segmentation_weight", 0.0, 100.0),
            "cam_threshold": between("cam_threshold", 0.01, 1.0),
            **self._labelled.options(),
        }

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        return [one.case for one in self._labelled.find(parts, datastore)]

    def _train(self, now: Round, start: MixModel | None) -> Trained:
        plan, cases = now.plan, self._labelled.find(now.parts, now.datastore)
        tuning = self.tuning(plan)
        views = self._views(now, still=tuning.encoder == "frozen")
        slices = presence_slices(self.basis.slices(), cases)
        step = mix_step(
            slices,
            views,
            frame=self.frame,
            batch=plan.batch,
            augment=self.basis.augmentation,
            threshold=plan.options["cam_threshold"],
            weight=plan.options["segmentation_weight"],
        )
        run = now.train("training", self._network(tuning, plan.settings.seed, start), step)
        return Trained(
            run=run,
            slices=len(slices),
            facts={
                "masks": len(views),
                "csv_cases": count_told(cases),
                "base": self.base.name,
                "tuning": tuning.record(),
                "cam_threshold": plan.options["cam_threshold"],
            },
        )

    def _network(self, tuning: Tuning, seed: int, start: MixModel | None) -> MixNetwork:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            classifier = build_classifier(labels=len(self.basis.labels), channels=self._channels)
        learner = SamLearner(self.base.model, tuning=tuning, seed=seed, attention=True)
        network = MixNetwork(learner, classifier)
        if start is not None:
            network.restore(start.network.learned())
        return network

    def _views(self, now: Round, *, still: bool) -> list[MixView]:
        """The objects of accepted cases on whole slices, telling how far it is.

        Left out are those that the network's masks are too coarse to show.

        Raises:
            InputError: (409) When there are none.
        """
        store, encoder, frame, found = self.basis.slices(), self.encoder(self.base), self.frame, []
        cases = now.parts.training
        limit = self.slices_each(len(cases))
        entries = store.load(cases).entries
        for entry, case in zip(entries, now.counted("preparing", cases), strict=True):
            assert case.label is not None
            image = self.basis.read(case.image)
            labelmap, window = read_labelmap(case.label, image), self.basis.window_for(image, {})
            indices, pixels, holds = (
                store.rows(case, entry, name) for name in ("indices", "images", "native")
            )
            for output, (label, value) in enumerate(self.basis.labels.items()):
                filled = holds[:, output].astype(bool)
                if not filled.any():
                    continue
                for n in choose_slices(filled, limit=limit, empty_share=0.0):
                    view = given_view(
                        image,
                        int(indices[n]),
                        window,
                        Prompts(),
                        truth=slice_image(labelmap, int(indices[n])) == value,
                        case=case.case_id,
                        label=label,
                        encoder=encoder,
                        frame=frame,
                        still=still,
                    )
                    if view.truth.max() > HALF:
                        found.append(MixView(view=view, pixels=pixels[n], output=output))
        if not found:
            raise no_objects(len(cases))
        return found

    def model(self, network: Any, training: Mapping[str, Any]) -> MixModel:
        """A network with what using it needs."""
        return MixModel(
            network=network,
            base=self.base.name,
            digest=self.base.digest,
            labels=self.basis.labels,
            size=self.basis.size,
            channels=self._channels,
            window=self.basis.window,
            training=training,
            cam_threshold=training["cam_threshold"],
        )

    def _load(self, path: Path, device: str) -> MixModel:
        return load_mix(path, self.base, device=device)

    def _save(self, path: Path, model: MixModel) -> None:
        save_mix(path, model)

    def _continues(self, model: MixModel, plan: Plan) -> bool:
        return model.channels == self._channels and model.network.learner.tuning == self.tuning(plan)

    def _score(self, model: MixModel, parts: Parts) -> Score:
        basis, rows, encoder = self.basis, {}, self.encoder(model.engine(self.base))
        options = CamOptions(threshold=model.cam_threshold, attention=True)
        for case in parts.held_out:
            assert case.label is not None
            image = basis.read(case.image)
            window = basis.window_for(image, {})
            found = auto_cam(
                image, model.classifier, encoder=encoder, window=window, options=options, zoom=False
            )
            truth = read_labelmap(case.label, image)
            rows[case.case_id] = dice_per_label(found.labelmap, truth, model.labels)
        present = presence_score(
            model.classifier, parts.held_out, window_for=basis.window_for, read=basis.read
        )
        known = {} if math.isnan(present.value) else {present.metric: present.value}
        return replace(summarize(rows, list(model.labels)), figures=known)

    def _figures(self, candidate: MixModel, parts: Parts) -> dict[str, Any]:
        return box_quality(
            candidate.classifier, parts.held_out, window_for=self.basis.window_for, read=self.basis.read
        )
