"""SAMs tuned on a few masks with prompts that are always the same, with those of clinicians, or with none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import Sam
from torch import Tensor

from bench.papers.sets import Sample
from bench.papers.study import Study
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.sam import SamEngine
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import Tuning
from sam_infer.tuning.tunedfile import TunedSam, load_tuned, save_tuned
from sam_infer.types import BoolArray, Prompts
from trainers.loop import Settings, State, Step, train
from trainers.samgiven import answered, asked_of, given_step
from trainers.samrounds import bce_dice, losses
from trainers.samsteps import tuning_step
from trainers.samviews import Frame, View, features_of, frame_of, given_view, view_weights

_NO_LIMIT = 1e9
#: ``box``: by the given box; ``attention``: and by what stands out, added to the embedding; ``lora``: that,
#: and low-rank products learn in the encoder; ``bare``: by nothing; ``clinical``: as clinicians prompt.
Kind = Literal["box", "attention", "lora", "bare", "clinical"]
_LORA = Tuning(encoder="lora", decoder="full", rank=8)


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """How a SAM is tuned; the same for all rows of a table, all numbers are this project's own choices.

    Args:
        steps: Optimiser steps.
        batch: Prompts per step.
        rate: Learning rate.
    """

    steps: int = 150
    batch: int = 8
    rate: float = 3e-4


def tuned(
    study: Study,
    base: SamEngine,
    kind: Kind,
    samples: Sequence[Sample],
    prompts: Mapping[str, Prompts],
    *,
    schooling: Schooling,
    seed: int,
) -> TunedSam:
    """Tune a SAM on images of one label, all of which hold it; from its file where it was done before.

    Args:
        study: Where it is kept; its key must tell the prompts and the schooling apart.
        base: The SAM.
        kind: How it is prompted.
        samples: The images, whose masks are learned from.
        prompts: By image name; with attention.
        schooling: How.
        seed: Of all that is random.

    Returns:
        The SAM; ``training`` tells the seconds it took.
    """
    n = len(samples)
    path = study.out / "networks" / f"sam-{kind}-{n}-{seed}-{study.key(kind, n, seed)}.safetensors"
    if path.is_file():
        return load_tuned(path, base)
    tuning = _LORA if kind == "lora" else Tuning()
    frame = frame_of(base)
    views = [
        given_view(
            sample.image, 0, sample.window, given_as(kind, prompts[sample.name]), truth=sample.truth > 0,
            case=sample.group, label="", encoder=study.encoder, frame=frame, still=kind != "lora",
        )
        for sample in samples
    ]  # fmt: skip
    learner = SamLearner(base.model, tuning=tuning, seed=seed, attention=kind in ("attention", "lora"))
    settings = Settings(
        iterations=schooling.steps,
        max_seconds=_NO_LIMIT,
        learning_rate=schooling.rate,
        seed=seed,
        precision=study.recipe.precision,
        epochs=1,
    )
    done = train(learner, _step(kind, views, frame=frame, batch=schooling.batch), settings)
    assert isinstance(done.network, SamLearner)
    model = TunedSam(
        network=done.network,
        base=base.name,
        digest=base.digest,
        labels=study.data.labels,
        training={"seconds": done.seconds, "seed": seed},
    )
    save_tuned(path, model)
    return model


def attention_weight(model: TunedSam | None) -> float | None:
    """Mean size of the weights with which attention is added to the embedding; None where it is not."""
    extras = None if model is None else model.network.extras
    if extras is None or extras.attention is None:
        return None
    return float(extras.attention_weights().detach().abs().mean())


def answering(study: Study, base: SamEngine, model: TunedSam | None) -> SliceEncoder:
    """What answers with a tuned SAM, or with the base (None), over the base's embeddings where they hold."""
    if model is None:
        return study.encoder
    still = model.network.tuning.encoder == "frozen"
    return SliceEncoder(engine=model.engine(base), store=study.encoder.store if still else None)


def bare_answer(study: Study, base: SamEngine, model: TunedSam, sample: Sample) -> BoolArray:
    """(H, W) bool: what a SAM that learned without prompts answers without one; engines refuse that."""
    engine = model.engine(base)
    features = study.encoder.embedding(sample.image, 0, sample.window)[0].features["image"].to(engine.device)
    with torch.inference_mode():
        low = answered(*bare_masks(engine.model, features), frame_of(engine))
        logits = engine.framing.native(low[:, None], sample.size, engine.model)
    found: BoolArray = (logits[0, 0] > 0).cpu().numpy()
    return found


def given_as(kind: Kind, prompts: Prompts) -> Prompts:
    """What a SAM of a kind is given of prompts with a box and attention."""
    if kind == "bare":
        return Prompts()
    return prompts if kind in ("attention", "lora") else Prompts(box=prompts.box)


def _step(kind: Kind, views: Sequence[View], *, frame: Frame, batch: int) -> Step:
    if kind == "bare":
        return bare_step(views, frame=frame, batch=batch)
    if kind == "clinical":
        # Each view is asked for twice, by a box and by a click: as many prompts a step as elsewhere.
        return tuning_step(views, frame=frame, batch=max(1, batch // 2))
    return given_step(views, frame=frame, batch=batch, criterion=bce_dice)


def bare_step(views: Sequence[View], *, frame: Frame, batch: int) -> Step:
    """A step without any prompt, as SAMed learns (Zhang and Liu, arXiv 2304.13785): the image says it all.

    Args:
        views: Whole images with known truth, and `Prompts` that are empty.
        frame: What the network makes of an image.
        batch: Views per step.
    """
    weights = view_weights(views)

    def step(state: State) -> Tensor:
        learner = state.network
        assert isinstance(learner, SamLearner)
        drawn = torch.multinomial(weights, batch, replacement=True, generator=state.generator).tolist()
        chosen = [views[n] for n in drawn]
        narrow = state.precision == "bfloat16"
        with torch.autocast(state.device.type, torch.bfloat16, enabled=narrow):
            features = features_of(chosen, learner.sam, frame, state.device)
            masks, iou = bare_masks(learner.sam, features)
        asked = asked_of(chosen, frame, state.device)
        wrong, _ = losses(masks, iou, asked, masks_of=frame.framing.masks, criterion=bce_dice)
        return wrong.mean()

    return step


def bare_masks(sam: Sam, features: Tensor) -> tuple[Tensor, Tensor]:
    """All four masks (B, 4, S, S) and predicted IoU (B, 4) of images without a prompt, float32.

    Args:
        sam: The network.
        features: (B, C, h, w), the embeddings of the images.
    """
    encoder = sam.prompt_encoder
    masks, iou = sam.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(features[:1]),
        image_pe=encoder.get_dense_pe().to(features.dtype),
        sparse_prompt_embeddings=features.new_zeros(len(features), 0, encoder.embed_dim),
        dense_prompt_embeddings=features + encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
    )
    return masks.float(), iou.float()
