"""Stage 2 of Konwer et al.: a policy learns from how its own candidates were preferred one to another."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.papers.feedback import ANNOTATORS, INFORMED, directions, with_noise
from bench.papers.policy import Policy, Start
from bench.papers.sets import Sample
from sam_infer.candidates import CandidateSet, Source, by_masks, by_thresholds, ranking_of
from sam_infer.candidatesources import stochastic_logits
from sam_infer.tuning.learner import SamLearner
from sam_infer.types import BoolArray
from trainers.loop import State, Step, train
from trainers.preferencestep import (
    BETAS,
    best_candidate_loss,
    coefficients,
    preference_loss,
    score_weights,
)
from trainers.rated import Rated, rated_step, reference_logits, three_masks
from trainers.samgiven import answered, asked_of, given_masks
from trainers.samviews import Frame, View, low_truth


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What is asked about each image of stage 2, and what is learned from the answer.

    Args:
        source: What makes the candidates.
        annotator: A name of `bench.papers.feedback.ANNOTATORS`.
        noise: Share of the images in which two neighbours, in rank or level, are taken for each other.
        betas: Weights of the outermost and of the innermost pair of candidates.
        best: Learn the best candidate as if it were the truth, and not the preference.
    """

    source: Source = "thresholds"
    annotator: str = "overlap"
    noise: float = 0.0
    betas: tuple[float, float] = BETAS
    best: bool = False

    @property
    def informed(self) -> bool:
        """Whether the truth of the images is looked at."""
        return self.annotator in INFORMED


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The images of stage 2 and what was answered about them; the views hold no truth.

    Args:
        rated: What is learned from.
        best: (R, S, S) bool, the best candidates.
        figures: What of it a table tells.
    """

    rated: Sequence[Rated]
    best: Tensor
    figures: dict[str, Any]


def align(start: Start, policy: Policy, samples: Sequence[Sample], feedback: Feedback) -> tuple[Policy, dict]:
    """Improve a policy by feedback; the mask decoder alone learns, as published.

    Args:
        start: What rows share.
        policy: The reference.
        samples: The images of stage 2.
        feedback: Whose, about what.

    Returns:
        The aligned policy, and figures: ``band``, the share of pixels that any candidate is preferred on;
        ``margin``, the mean |margin| in the end; and `bench.papers.feedback.directions`.
    """
    began, stages = time.monotonic(), start.stages
    asked = ask(start, policy, samples, feedback)
    learner = start.learner(policy.kind, policy.learner)
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(name.startswith("sam.mask_decoder."))
    if feedback.best:
        step = _best_step(asked, frame=start.frame, batch=stages.batch)
    else:
        step = rated_step(asked.rated, frame=start.frame, batch=stages.batch, temperature=stages.temperature)
    done = train(learner, step, start.settings(steps=stages.second, rate=stages.second_rate)).network
    assert isinstance(done, SamLearner)
    seconds = policy.seconds + time.monotonic() - began
    moved = reference_logits(done, [one.view for one in asked.rated], start.frame)
    before, c = (torch.stack([getattr(one, name) for one in asked.rated]) for name in ("reference", "c"))
    found = preference_loss(moved, before, c, stages.temperature)
    figures = {**asked.figures, "band": found.band, "margin": found.margin}
    return Policy(learner=done, kind=policy.kind, seconds=seconds), figures


def ask(start: Start, policy: Policy, samples: Sequence[Sample], feedback: Feedback) -> Asked:
    """Have candidates made by a policy and preferred by an annotator, on the network's grid of masks.

    Args:
        start: What rows share.
        policy: The reference.
        samples: The images; their truth goes to the annotator and nowhere else.
        feedback: Whose, about what.
    """
    frame = start.frame
    views = [start.view(sample, policy.kind, truth=False) for sample in samples]
    reference = reference_logits(policy.learner, views, frame)
    candidates = _candidates(start, policy, samples, views, reference, feedback.source)

    def truth(sample: Sample) -> BoolArray:
        return low_truth(sample.truth > 0, frame) > 127

    annotator, rows = ANNOTATORS[feedback.annotator], []
    for sample, one in zip(samples, candidates, strict=True):
        rng = np.random.default_rng([start.seed, 3, zlib.crc32(sample.name.encode())])
        rows.append(annotator(one, partial(truth, sample), rng))
    noise = np.random.default_rng([start.seed, 4])
    rated = feedback.annotator == "rating"
    scores = with_noise(np.stack(rows), feedback.noise, noise, levels=rated)
    masks = torch.from_numpy(np.stack([one.masks for one in candidates]))
    weights = score_weights(torch.from_numpy(scores), feedback.betas)
    c = coefficients(masks, weights=weights)
    first = torch.tensor([ranking_of(row)[0] for row in scores])
    return Asked(
        rated=[Rated(view=v, c=w, reference=r) for v, w, r in zip(views, c, reference, strict=True)],
        best=masks[torch.arange(len(masks)), first],
        figures=directions(candidates, scores),
    )


def _candidates(
    start: Start,
    policy: Policy,
    samples: Sequence[Sample],
    views: Sequence[View],
    reference: Tensor,
    source: Source,
) -> list[CandidateSet]:
    """Of each image, on the network's grid of masks; ``reference`` (R, S, S) logits."""
    if source == "thresholds":
        return [by_thresholds(one.numpy()) for one in torch.sigmoid(reference)]
    if source == "masks":
        return [by_masks(three_masks(policy.learner, view, start.frame)) for view in views]
    encoder, out = start.encoder(policy), []
    for sample in samples:
        given = start.given(sample, policy.kind)
        logits = stochastic_logits(encoder, sample.image, 0, sample.window, given)
        masks = np.stack([low_truth(one > 0, start.frame) > 127 for one in logits])
        out.append(CandidateSet(masks=masks, source="dropout"))
    return out


def _best_step(asked: Asked, *, frame: Frame, batch: int) -> Step:
    """A step of the control: the best candidates are taken for the truth."""

    def step(state: State) -> Tensor:
        chosen = torch.randperm(len(asked.rated), generator=state.generator)[:batch]
        views = [asked.rated[n].view for n in chosen.tolist()]
        narrow = state.precision == "bfloat16"
        masks, iou = given_masks(
            state.network, views, asked_of(views, frame, state.device), frame, narrow=narrow
        )
        return best_candidate_loss(answered(masks, iou, frame), asked.best[chosen].to(state.device))

    return step
