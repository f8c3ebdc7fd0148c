"""A SAM tuned on few labelled images, prompted the same way everywhere: what preferences improve upon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from bench.papers.coarse import BoxSource, careless_box, network_boxes, whole_box
from bench.papers.report import sam_of
from bench.papers.sets import Sample
from bench.papers.split import draw_labelled
from bench.papers.study import Study
from sam_infer.embeddings import SliceEncoder
from sam_infer.overlap import dice
from sam_infer.text.descriptions import describe, spoken
from sam_infer.text.encoders import HashedTextEncoder
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import Tuning
from sam_infer.tuning.tunedfile import TunedSam, load_tuned, save_tuned
from sam_infer.types import Box, FloatArray, Prompts
from trainers.loop import Settings, train
from trainers.preferencestep import TEMPERATURE
from trainers.samgiven import given_step
from trainers.samviews import View, frame_of, given_view

#: What a SAM is prompted with: a box, or one around the whole image, which says nothing; and a text.
Kind = Literal["box", "box+text", "whole", "whole+text"]
_NO_LIMIT = 1e9
#: Thresholds of probability among which the best one is chosen.
GRID = tuple(round(0.05 * n, 2) for n in range(2, 19))


@dataclass(frozen=True, kw_only=True)
class Stages:
    """How a policy is trained: numbers of this project.

    Those of stage 2 were chosen on training images that were neither labelled nor asked about.

    Args:
        first: Steps of stage 1.
        second: Steps of stage 2.
        batch: Images per step.
        rate: Learning rate of stage 1.
        second_rate: Of stage 2, of all its rows alike.
        temperature: Of the margin.
    """

    first: int = 200
    second: int = 40
    batch: int = 8
    rate: float = 3e-4
    second_rate: float = 1e-4
    temperature: float = TEMPERATURE


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A tuned SAM.

    Args:
        learner: With what it learned.
        kind: What it is prompted with.
        seconds: That its training took, with the stages before.
    """

    learner: SamLearner
    kind: Kind
    seconds: float


class Start:
    """One draw of labelled images with one seed: what its rows share.

    Args:
        study: Of one label, which every image holds. Its key must tell stages, boxes and numbers of labelled
            images apart.
        stages: How policies are trained.
        labelled: Labelled images.
        boxes: Where boxes come from.
        seed: Of the draw and of the trainings.
    """

    def __init__(self, study: Study, stages: Stages, *, labelled: int, boxes: BoxSource, seed: int) -> None:
        self.study, self.stages, self.seed = study, stages, seed
        self.base = sam_of(study)
        self.frame = frame_of(self.base)
        self.draw = draw_labelled(study.split, labelled, seed)
        order = np.random.default_rng([seed, 2]).permutation(len(self.draw.pool))
        #: The other images, in the order in which they are asked about.
        self.pool = tuple(self.draw.pool[n] for n in order)
        self.label = next(iter(study.data.labels))
        self.sentence = sentence_about(self.label)
        self._source = boxes
        self._first: dict[tuple[Kind, int], Policy] = {}

    @cached_property
    def _text(self) -> FloatArray:
        return HashedTextEncoder().encode([self.sentence])[0]

    @cached_property
    def boxes(self) -> Mapping[str, Box]:
        """The box of each image, by its name."""
        if self._source == "unet":
            return network_boxes(self.study, self.draw, self.seed)
        return {s.name: careless_box(s) for s in (*self.study.split.train, *self.study.split.test)}

    def given(self, sample: Sample, kind: Kind = "box") -> Prompts:
        """What an image is prompted with: the same in all rows of a kind."""
        box = self.boxes[sample.name] if kind.startswith("box") else whole_box(sample)
        return Prompts(box=box, text=self._text if kind.endswith("text") else None)

    def view(self, sample: Sample, kind: Kind = "box", *, truth: bool) -> View:
        """An image as the network sees it; without ``truth`` nothing of it gets there."""
        return given_view(
            sample.image, 0, sample.window, self.given(sample, kind),
            truth=sample.truth > 0 if truth else None, case=sample.name, label=self.label,
            encoder=self.study.encoder, frame=self.frame, still=True,
        )  # fmt: skip

    def settings(self, *, steps: int, rate: float) -> Settings:
        """How a stage runs: float32, since on small decoders shorter numbers gain nothing."""
        return Settings(iterations=steps, max_seconds=_NO_LIMIT, learning_rate=rate, seed=self.seed, epochs=1)

    def learner(self, kind: Kind, like: SamLearner | None = None) -> SamLearner:
        """The base with a decoder that learns, from where another is; the prompts of a kind can be given."""
        width = HashedTextEncoder.width if kind.endswith("text") else None
        new = SamLearner(self.base.model, tuning=Tuning(), seed=self.seed, text=width)
        if like is not None:
            new.restore(like.learned())
        return new

    def first(self, kind: Kind = "box", *, more: int = 0) -> Policy:
        """Stage 1: tuned on the labelled images, and on the truth of the first ``more`` others.

        With more images it takes the steps of both stages. It is kept in the study's folder.
        """
        if (kind, more) not in self._first:
            self._first[kind, more] = self._kept(kind, more)
        return self._first[kind, more]

    def _kept(self, kind: Kind, more: int) -> Policy:
        study, labelled = self.study, len(self.draw.labelled)
        name = f"stage1-{kind}-{more}"
        key = study.key(name, labelled, self.seed)
        path = study.out / "networks" / f"{name}-{labelled}-{self.seed}-{key}.safetensors"
        if path.is_file():
            kept = load_tuned(path, self.base)
            return Policy(learner=kept.network, kind=kind, seconds=float(kept.training["seconds"]))
        policy = self._train(kind, more)
        model = TunedSam(
            network=policy.learner, base=self.base.name, digest=self.base.digest,
            labels=study.data.labels, training={"seconds": policy.seconds, "seed": self.seed},
        )  # fmt: skip
        save_tuned(path, model)
        return policy

    def _train(self, kind: Kind, more: int) -> Policy:
        samples = (*self.draw.labelled, *self.pool[:more])
        views = [self.view(sample, kind, truth=True) for sample in samples]
        step = given_step(views, frame=self.frame, batch=self.stages.batch)
        steps = self.stages.first + (self.stages.second if more else 0)
        done = train(self.learner(kind), step, self.settings(steps=steps, rate=self.stages.rate))
        assert isinstance(done.network, SamLearner)
        return Policy(learner=done.network, kind=kind, seconds=done.seconds)

    def encoder(self, policy: Policy) -> SliceEncoder:
        """The engine that answers with a policy, over the embeddings of its base."""
        engine = self.base.with_model(
            policy.learner.served(), extras=policy.learner.extras, same_encoder=True
        )
        return SliceEncoder(engine=engine, store=self.study.encoder.store)

    def logits(self, policy: Policy, samples: Sequence[Sample]) -> dict[str, FloatArray]:
        """(H, W) float32 logits of images at their own resolution, by name."""
        encoder, out = self.encoder(policy), {}
        for sample in samples:
            given = self.given(sample, policy.kind)
            found = encoder.decode(sample.image, 0, sample.window, [given], zoom=False)[0]
            out[sample.name] = found.logits[found.best]
        return out

    def best_threshold(self, policy: Policy) -> float:
        """The probability above which the labelled images' masks are best."""
        samples = self.draw.labelled
        return best_threshold(self.logits(policy, samples), samples)


def sentence_about(label: str) -> str:
    """What is said of a label: the shipped sentence, else its name alone."""
    return describe(label) or spoken(label)


def as_logit(probability: float) -> float:
    """The logit of a probability."""
    return float(np.log(probability / (1 - probability)))


def best_threshold(logits: Mapping[str, FloatArray], samples: Sequence[Sample]) -> float:
    """The probability of `GRID` above which masks have the highest mean Dice; of equals the nearest to 0.5.

    Args:
        logits: By image name, (H, W) float32.
        samples: With truth.
    """

    def worth(probability: float) -> tuple[float, float]:
        level = as_logit(probability)
        values = [dice(logits[sample.name] > level, sample.truth > 0) for sample in samples]
        return float(np.mean(values)), -abs(probability - 0.5)

    return max(GRID, key=worth)
