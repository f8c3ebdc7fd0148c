"""Candidates from the engine that clicks are answered with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import special

from sam_infer.candidates import CandidateSet, Source, by_dropout, by_masks, by_thresholds
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.types import FloatArray, Prompts
from sam_infer.volumes import Image

#: Stochastic passes, and the share of the embedding that each does without (own choices).
PASSES = 4
DROPPED = 0.3


def make_candidates(
    encoder: SliceEncoder, image: Image, k: int, window: Window, prompts: Prompts, source: Source
) -> CandidateSet:
    """Candidates of the object that prompts are about.

    The prompts are decoded as they are, in one call and on the whole slice, as training decodes them again;
    clicks are not corrections of one another here.

    Args:
        encoder: The engine behind its caches.
        image: The image.
        k: Slice index.
        window: The intensity window.
        prompts: The object's, not empty.
        source: What makes the candidates.

    Raises:
        InputError: (422) When the engine cannot make candidates of this kind from these prompts.
    """
    if source == "dropout":
        return by_dropout(stochastic_logits(encoder, image, k, window, prompts))
    found = encoder.decode(image, k, window, [prompts], zoom=False)[0]
    if source == "thresholds":
        return by_thresholds(special.expit(found.logits[found.best]))
    if len(found.logits) < 2:
        remedy = (
            f"{encoder.engine.name} answers these prompts with one mask; send one foreground point alone, "
            "or ask for thresholds"
        )
        raise InputError("source", source, remedy, status=422)
    return by_masks(found)


def stochastic_logits(
    encoder: SliceEncoder,
    image: Image,
    k: int,
    window: Window,
    prompts: Prompts,
    *,
    passes: int = PASSES,
    dropped: float = DROPPED,
    seed: int = 0,
) -> FloatArray:
    """The best logits of several passes of an engine whose embedding loses some of its values at random.

    Dropout as the source of candidates is named by a follow-up of the published method; where it acts is this
    project's own choice: on the embedding of the whole slice, so that it is encoded once and the network
    stays as it is.

    Args:
        encoder: The engine behind its caches.
        image: The image.
        k: Slice index.
        window: The intensity window.
        prompts: The object's, not empty.
        passes: N.
        dropped: Share of the values that are set to 0; the others grow so that the mean stays.
        seed: The same seed gives the same logits.

    Returns:
        (N, H, W) float32 at the slice's own resolution.

    Raises:
        InputError: (422) When the engine keeps pixels instead of features.
    """
    if encoder.engine.encoding is None:
        remedy = f"{encoder.engine.name} keeps no features that could drop out; ask for thresholds"
        raise InputError("source", "dropout", remedy, status=422)
    embedding, _ = encoder.embedding(image, k, window)
    generator = torch.Generator().manual_seed(seed)

    def drop(feature: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(feature.shape, generator=generator) >= dropped
        return feature * (kept / (1 - dropped)).to(feature)

    out = []
    for _ in range(passes):
        features = {name: drop(feature) for name, feature in embedding.features.items()}
        found = encoder.engine.decode(replace(embedding, features=features), [prompts])[0]
        out.append(found.logits[found.best])
    return np.stack(out)
