"""The trainers behind ``POST /train/pseudo_label`` and ``/train/self_training``: one model teaches the next.

Keuth et al., SAM Carries the Burden, arXiv:2411.12602: a network trained on the accepted few labels the
images that have no label, SAM refines these labels, and a new network learns from them, from scratch, in one
round, without the accepted labels and without a filter. Self-training is the same without SAM. Network, loss
and augmentation are this project's own, which all of its trainers share; theirs are another U-Net on sigmoids
with a weighted cross entropy.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sam_infer.embeddings import SliceEncoder
from sam_infer.intensity import Window
from sam_infer.networks.unet import UnetModel
from sam_infer.prompts.masks import Keep, Seed, cleaned_labelmap
from sam_infer.refine import First, RefineLimits, Scheme, refine_volume
from sam_infer.volumes import Image
from trainers.basis import Basis, Parts
from trainers.data import Case, Datastore, unlabelled_cases
from trainers.options import choice, flag, number
from trainers.proposals import keep_proposal, kept_proposal
from trainers.round import Plan, Round
from trainers.steps import supervised_step
from trainers.unetrecipe import Trained, UnetRecipe

#: Images that are labelled by the model, at most, as the published run on wrists has it.
MOST = 500
_CHOSEN = ("first_prompt", "second_prompt", "seed_point", "components")


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """A pseudo label.

    Args:
        labelmap: (I, J, K) uint8.
        facts: What its provenance says of it.
    """

    labelmap: NDArray[np.uint8]
    facts: Mapping[str, Any]


class _Teaching(UnetRecipe):
    """A model trained on the accepted cases labels the open ones; another learns from that."""

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {**super().config(), "max_unlabelled": MOST, "include_accepted": False}

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "max_unlabelled": int(number(request, "max_unlabelled", MOST, low=1, high=1e6, whole=True)),
            "include_accepted": flag(request, "include_accepted", False),
        }

    def _missing(self, parts: Parts) -> list[str]:
        return super()._missing(parts) + ([] if parts.unlabelled else ["at least 1 case without a label"])

    def _inputs(self, plan: Plan, parts: Parts, datastore: Datastore) -> Sequence[Case]:
        return [*parts.training, *self._pool(plan, parts, datastore)]

    def _pool(self, plan: Plan, parts: Parts, datastore: Datastore) -> list[Case]:
        """The images that are labelled by the model; of too many the same random ones for a seed."""
        names, most = parts.unlabelled, plan.options["max_unlabelled"]
        if len(names) > most:
            names = sorted(random.Random(plan.settings.seed).sample(names, most))
        return unlabelled_cases(datastore, names)

    def _train(self, now: Round, start: UnetModel | None) -> Trained:
        store, seed = self.basis.slices(), now.plan.settings.seed
        slices = store.load(now.parts.training)
        coarse = now.train("coarse", self.network(None, seed), self._step(slices, now))
        teacher = self.model(coarse.network, {})
        pool = self._pool(now.plan, now.parts, now.datastore)
        cases = [self._labelled(case, teacher, now) for case in now.counted("pseudo labels", pool)]
        if now.plan.options["include_accepted"]:
            cases += now.parts.training
        slices = store.load(cases)
        run = now.train("training", self.network(start, seed), self._step(slices, now))
        facts = {"pseudo_labels": len(pool), "tag": self.name}
        seconds = coarse.seconds + run.seconds
        return Trained(run=replace(run, seconds=seconds), slices=len(slices), facts=facts)

    def _step(self, slices: Any, now: Round) -> Any:
        classes, augment = len(self.basis.labels), self.basis.augmentation
        return supervised_step(slices, classes=classes, batch=now.plan.batch, augment=augment)

    def _labelled(self, case: Case, teacher: UnetModel, now: Round) -> Case:
        """A case with the label map that the teacher gives it, kept in the store."""
        known = kept_proposal(now.datastore, case.case_id, tag=self.name, key=now.key)
        if known is None:
            image = self.basis.read(case.image)
            found = self._propose(image, self.basis.window_for(image, {}), teacher, now.plan.options)
            settings = {**now.plan.options, "round": now.index, "cases": len(now.parts.training)}
            keep_proposal(
                now.datastore,
                case.case_id,
                found.labelmap,
                image,
                tag=self.name,
                labels=self.basis.labels,
                provenance={"trainer": self.name, "key": now.key, **settings, **found.facts},
            )
            known = kept_proposal(now.datastore, case.case_id, tag=self.name, key=now.key)
            assert known is not None
        return replace(case, label=known)

    @abstractmethod
    def _propose(
        self, image: Image, window: Window, teacher: UnetModel, options: Mapping[str, Any]
    ) -> Proposed:
        """The pseudo label of an image."""


class SelfTrainingTrainer(_Teaching):
    """The control: the model's own labels, as they are or cleaned, without SAM.

    Args:
        basis: What it stands on.
    """

    def __init__(self, basis: Basis) -> None:
        super().__init__(
            basis,
            name="self_training",
            description="Trains a U-Net on its predecessor's labels of the open cases, without SAM",
            warm=False,
        )

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {**super().config(), "labels": ["raw", "cleaned"]}

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._options(request), "labels": choice(request, "labels", self.config()["labels"])}

    def _propose(
        self, image: Image, window: Window, teacher: UnetModel, options: Mapping[str, Any]
    ) -> Proposed:
        found = teacher.predict_volume(image, window, certainty=True)
        labelmap = found.labelmap
        if options["labels"] == "cleaned":
            labelmap = cleaned_labelmap(labelmap, found.certainty)
        return Proposed(labelmap=labelmap, facts={"confidence": round(found.confidence, 4)})


class PseudoLabelTrainer(_Teaching):
    """Pseudo labels refined by SAM.

    Args:
        basis: What it stands on.
        encoder: The promptable engine behind its caches.
    """

    def __init__(self, basis: Basis, *, encoder: SliceEncoder) -> None:
        super().__init__(
            basis,
            name="pseudo_label",
            description="Trains a U-Net on its predecessor's labels of the open cases, refined by SAM",
            warm=False,
        )
        self._encoder = encoder

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {
            **super().config(),
            "first_prompt": list(get_args(First)),
            "second_prompt": ["points", "box", "positive", "none"],
            "seed_point": list(get_args(Seed)),
            "components": list(get_args(Keep)),
            "dilation": 0,
            "min_iou": 0.0,
            "min_agreement": 0.0,
        }

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config()
        return {
            **super()._options(request),
            **{name: choice(request, name, config[name]) for name in _CHOSEN},
            "dilation": int(number(request, "dilation", 0, low=0, high=64, whole=True)),
            "min_iou": number(request, "min_iou", 0.0, low=0, high=1),
            "min_agreement": number(request, "min_agreement", 0.0, low=0, high=1),
            "engine": self._encoder.engine.fingerprint,
        }

    def _propose(
        self, image: Image, window: Window, teacher: UnetModel, options: Mapping[str, Any]
    ) -> Proposed:
        found = teacher.predict_volume(image, window, certainty=True)
        scheme = Scheme(
            first=options["first_prompt"],
            second=options["second_prompt"],
            seed=options["seed_point"],
            dilation=options["dilation"],
            keep=options["components"],
        )
        refined = refine_volume(
            image,
            cleaned_labelmap(found.labelmap, found.certainty, keep=scheme.keep),
            encoder=self._encoder,
            window=window,
            scheme=scheme,
            limits=RefineLimits(iou=options["min_iou"], agreement=options["min_agreement"]),
        )
        names = {value: name for name, value in self.basis.labels.items()}
        scores = {names[v]: round(one.score, 4) for v, one in refined.labels.items() if one.score is not None}
        facts = {"confidence": round(found.confidence, 4), "scores": scores}
        return Proposed(labelmap=refined.labelmap, facts=facts)
