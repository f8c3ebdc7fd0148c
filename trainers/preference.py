"""The trainer behind ``POST /train/preference``: tuned on accepted masks, then on what people preferred.

After Konwer et al. (CVPR 2025, arXiv 2503.04639). First stage: prompts that nobody drew and a text, answered
with the accepted masks in view. Second stage: of several candidates some were preferred, and the mask decoder
moves towards those, in the closed form of their loss (`trainers.preferencestep`). Theirs come from a virtual
annotator that knows the truth; here they come from people (``POST /preference/``), and from the accepted
masks themselves, which rank candidates at no extra work.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sam_infer.autotext import auto_text, worded
from sam_infer.candidates import SOURCES
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.geometry import slice_image
from sam_infer.prompters import Prompter
from sam_infer.text.labeltexts import LabelTexts
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.tunedfile import TunedSam
from sam_infer.volumes import read_labelmap
from trainers.basis import Basis, Parts
from trainers.data import Case, unlabelled_cases
from trainers.evaluate import Score, dice_per_label, summarize
from trainers.modelrecipe import Trained
from trainers.options import choice, flag, number
from trainers.preferencefile import Entry
from trainers.preferences import PreferenceStore
from trainers.preferencestep import TEMPERATURE
from trainers.rated import Rated, rated_by_people, rated_by_truth, rated_step
from trainers.round import Plan, Round
from trainers.samgiven import given_step
from trainers.samrecipe import SamRecipe
from trainers.samviews import View, given_view
from trainers.slicestore import choose_slices

logger = logging.getLogger(__name__)
FEEDBACK = ("people and accepted", "people", "accepted")


class PreferenceTrainer(SamRecipe):
    """Tunes a SAM for prompts that nobody draws, and aligns it with what was preferred.

    Args:
        basis: What it stands on.
        base: The SAM that is tuned; it is never changed.
        store: Embeddings of the base on disk; None = they are made again each time.
        prompters: Where prompts come from, by name, the first by default; each raises an `InputError` (409)
            where it is not to be had.
        texts: Gives what embeds texts about labels; raises an `InputError` (409) where it is not there.
        preferences: What people preferred.
    """

    def __init__(
        self,
        basis: Basis,
        *,
        base: SamEngine,
        store: EmbeddingStore | None,
        prompters: Mapping[str, Callable[[], Prompter]],
        texts: Callable[[], LabelTexts],
        preferences: PreferenceStore,
    ) -> None:
        super().__init__(
            basis,
            base=base,
            store=store,
            name="preference",
            served="preference",
            description="Tunes a SAM for automatic prompts and text, and aligns it with what was preferred",
        )
        self.prompters = prompters
        self.texts = texts
        self.preferences = preferences

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {
            **super().config(),
            "prompts": list(self.prompters),
            "text": True,
            "feedback": list(FEEDBACK),
            "candidates": list(SOURCES),
            "iterations": 200,
            "learning_rate": 0.0003,
            "aligning_iterations": 40,
            "aligning_learning_rate": 0.0001,
            "temperature": TEMPERATURE,
        }

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config()
        said = flag(request, "text", config["text"])
        chosen = choice(request, "prompts", config["prompts"])

        def told(name: str, low: float, high: float, *, whole: bool = False) -> float:
            return number(request, name, config[name], low=low, high=high, whole=whole)

        return {
            **super()._options(request),
            "prompts": chosen,
            "prompter": self.prompters[chosen]().fingerprint,
            "text": self.texts().record(self.basis.labels) if said else None,
            "feedback": choice(request, "feedback", config["feedback"]),
            "candidates": choice(request, "candidates", config["candidates"]),
            "aligning": int(told("aligning_iterations", 1, 1e6, whole=True)),
            "aligning_rate": told("aligning_learning_rate", 1e-7, 1.0),
            "temperature": told("temperature", 0.01, 1e4),
            "rated": sorted(json.dumps(entry.record()) for entry in self.preferences.all_rated()),
        }

    def facts(self, plan: Plan) -> dict[str, Any]:
        """What of a plan the use of its result depends on."""
        return {"prompts": plan.options["prompts"]}

    def _champion(self, plan: Plan) -> TunedSam | None:
        """What is served, where it can answer: with its texts as they were, and its prompts to be had."""
        found = super()._champion(plan)
        if found is None or not found.fingerprint:
            return found
        try:
            self.prompters[found.training["prompts"]]()
            said = self.texts().record(self.basis.labels) if found.network.extras is not None else {}
        except InputError as error:
            reason = str(error)
        else:
            if found.texts == said:
                return found
            reason = "its texts have changed"
        logger.warning("the served model cannot answer any more (%s); compared with its base instead", reason)
        return self._untuned(plan)

    def _continues(self, model: TunedSam, plan: Plan) -> bool:
        return super()._continues(model, plan) and model.texts == (plan.options["text"] or {})

    def _train(self, now: Round, start: TunedSam | None) -> Trained:
        plan, options = now.plan, now.plan.options
        tuning, seed = self.tuning(plan), plan.settings.seed
        still = tuning.encoder == "frozen"
        prompter, texts = self.prompters[options["prompts"]](), self.texts() if options["text"] else None
        views = list(self._views(now, prompter, texts, still=still))
        if not views:
            raise InputError(
                "prompts",
                options["prompts"],
                "it sees none of the labels on the accepted cases; train it first, or choose another",
                status=409,
            )
        learner = SamLearner(
            self.base.model, tuning=tuning, seed=seed, text=None if texts is None else texts.encoder.width
        )
        if start is not None:
            learner.restore(start.network.learned())
        step = given_step(views, frame=self.frame, batch=plan.batch)
        first = now.train("prompts", learner, step)
        reference = first.network
        assert isinstance(reference, SamLearner)
        rated = list(self._rated(now, reference, views, texts, still=still))
        facts = {
            "base": self.base.name,
            "tuning": tuning.record(),
            **self.facts(plan),
            "rated_by_people": len(rated) - (len(views) if options["feedback"] != "people" else 0),
            "rated_by_accepted_masks": len(views) if options["feedback"] != "people" else 0,
        }
        if not any(one.c.any() for one in rated):
            return Trained(run=first, slices=len(views), facts={**facts, "aligned": False})
        policy = self._policy(reference, seed)
        settings = replace(
            plan.settings, iterations=options["aligning"], learning_rate=options["aligning_rate"]
        )
        settings = replace(settings, epochs=min(settings.epochs, settings.iterations))
        step = rated_step(rated, frame=self.frame, batch=plan.batch, temperature=options["temperature"])
        run = now.train("aligning", policy, step, settings)
        stopped = first.stopped or run.stopped
        run = replace(run, seconds=first.seconds + run.seconds, stopped=stopped)
        return Trained(run=run, slices=len(views), facts={**facts, "aligned": True})

    def _policy(self, reference: SamLearner, seed: int) -> SamLearner:
        """A copy of the first stage's model of which the mask decoder alone learns, as is published."""
        extras = reference.extras
        policy = SamLearner(
            self.base.model,
            tuning=reference.tuning,
            seed=seed,
            text=None if extras is None else extras.text_width,
        )
        policy.restore(reference.learned())
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith("sam.mask_decoder."))
        return policy

    def _views(
        self, now: Round, prompter: Prompter, texts: LabelTexts | None, *, still: bool
    ) -> Iterator[View]:
        """What is seen of the accepted cases, of each label that is there and that the prompter sees."""
        encoder, limit = self.encoder(self.base), self.slices_each(len(now.parts.training))
        for case in now.counted("prompting", now.parts.training):
            assert case.label is not None
            image = self.basis.read(case.image)
            truth, window = read_labelmap(case.label, image), self.basis.window_for(image, {})
            filled = np.array([bool(truth[:, :, k].any()) for k in range(image.shape[2])])
            if not filled.any():
                continue
            for k in choose_slices(filled, limit=limit, empty_share=0.0):
                for name, part in prompter.parts(image, window, k).items():
                    mask = slice_image(truth, k) == self.basis.labels[name]
                    if mask.any():
                        given = worded(
                            part.prompts, name, image, k, encoder=encoder, window=window, texts=texts
                        )
                        yield given_view(
                            image, k, window, given, truth=mask, case=case.case_id, label=name,
                            encoder=encoder, frame=self.frame, still=still,
                        )  # fmt: skip

    def _rated(
        self,
        now: Round,
        reference: SamLearner,
        views: Sequence[View],
        texts: LabelTexts | None,
        *,
        still: bool,
    ) -> Iterator[Rated]:
        feedback, frame = now.plan.options["feedback"], self.frame
        if feedback != "people":
            options, seed = now.plan.options, now.plan.settings.seed
            yield from rated_by_truth(reference, views, frame, source=options["candidates"], seed=seed)
        if feedback == "accepted":
            return
        encoder = self.encoder(self.base)
        for entry, case in self._entries(now):
            asked = entry.asked
            image = self.basis.read(case.image)
            size = (image.shape[1], image.shape[0])
            if asked.k >= image.shape[2] or asked.candidates.masks.shape[1:] != size:
                logger.warning("%s was replaced since its candidates were rated; left out", case.case_id)
                continue
            window = self.basis.window_for(image, {})
            given = worded(
                asked.prompts, asked.label, image, asked.k, encoder=encoder, window=window, texts=texts
            )
            view = given_view(
                image, asked.k, window, given, truth=None, case=case.case_id, label=asked.label,
                encoder=encoder, frame=frame, still=still,
            )  # fmt: skip
            assert entry.answer is not None
            yield rated_by_people(reference, view, asked.candidates.masks, entry.answer.scores, frame)

    def _entries(self, now: Round) -> Iterator[tuple[Entry, Case]]:
        """What people rated, of cases that are there and not held out."""
        accepted = {case.case_id: case for case in now.parts.training}
        open_cases = set(now.parts.unlabelled)
        for entry in self.preferences.all_rated():
            name, label = entry.asked.image_id, entry.asked.label
            if label not in self.basis.labels:
                continue
            if name in accepted:
                yield entry, accepted[name]
            elif name in open_cases:
                yield from ((entry, case) for case in unlabelled_cases(now.datastore, [name]))

    def model(self, network: Any, training: Mapping[str, Any]) -> TunedSam:
        """A network with what using it needs."""
        plain = super().model(network, training)
        if network.extras is None:
            return plain
        return replace(plain, texts=self.texts().record(self.basis.labels))

    def _score(self, model: TunedSam, parts: Parts) -> Score:
        """Dice of what `sam_auto_text` answers on the held-out cases."""
        prompter = self.prompters[model.training["prompts"]]()
        texts = self.texts() if model.network.extras is not None else None
        encoder, rows = self.encoder(model.engine(self.base)), {}
        for case in parts.held_out:
            assert case.label is not None
            image = self.basis.read(case.image)
            window = self.basis.window_for(image, {})
            found = auto_text(image, model, prompter, encoder=encoder, window=window, texts=texts)
            truth = read_labelmap(case.label, image)
            rows[case.case_id] = dice_per_label(found.labelmap, truth, self.basis.labels)
        return summarize(rows, list(self.basis.labels))
