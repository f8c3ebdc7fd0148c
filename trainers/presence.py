"""Slices with image-level labels, and the step that learns presence from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_infer.types import FloatArray
from trainers.augment import Augmentation
from trainers.data import Case, SliceSource, sampling_weights
from trainers.loop import State, Step
from trainers.slicestore import SliceStore


@dataclass(frozen=True, kw_only=True)
class LabelledCase:
    """A case and what is known of its slices.

    Args:
        case: The case; with an accepted label map, which then says what is on each slice, or without.
        slices: Label name to whether it is there, by slice index; for a case without a label map.
        every: The same for each of the case's other slices.
    """

    case: Case
    slices: Mapping[int, Mapping[str, bool]] = field(default_factory=dict)
    every: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PresenceSlices:
    """Training slices with what is known to be on them.

    Args:
        source: The slices; their label maps are not looked at.
        cases: (n,) int64, which image a slice comes from.
        table: (n, labels) float32: 1 present, 0 absent, nan unknown.
    """

    source: SliceSource
    cases: NDArray[np.int64]
    table: FloatArray

    def __len__(self) -> int:
        return len(self.cases)

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Images and label maps of some slices."""
        return self.source.take(indices)

    def present(self, classes: int) -> NDArray[np.bool_]:
        """(n, classes) bool, whether a slice is known to hold a label."""
        return self.table[:, :classes] == 1


def presence_slices(store: SliceStore, cases: Sequence[LabelledCase]) -> PresenceSlices:
    """Load cases; what an accepted label map holds is judged at the image's own resolution.

    Args:
        store: Prepares the slices.
        cases: At least one. Several may be of one image.
    """
    source = store.load([one.case for one in cases])
    names = {one.case.case_id: 0 for one in cases}
    owners = {name: n for n, name in enumerate(names)}
    table = np.full((len(source), len(store.labels)), np.nan, np.float32)
    for n, (one, entry) in enumerate(zip(cases, source.entries, strict=True)):
        rows = source.cases == n
        if one.case.label is not None:
            table[rows] = store.rows(one.case, entry, "native")
        else:
            known = [one.slices.get(k, one.every) for k in store.rows(one.case, entry, "indices").tolist()]
            table[rows] = [[row.get(name, np.nan) for name in store.labels] for row in known]
    images = np.array([owners[one.case.case_id] for one in cases], np.int64)
    return PresenceSlices(source=source, cases=images[source.cases], table=table)


def presence_step(slices: PresenceSlices, *, batch: int = 8, augment: Augmentation | None = None) -> Step:
    """The step that learns from image-level labels, see `presence_batches` and `presence_loss`.

    Args:
        slices: What is trained on.
        batch: Slices per step.
        augment: Random changes; None = none.
    """
    draw = presence_batches(slices, batch=batch, augment=augment)

    def step(state: State) -> Tensor:
        images, wanted = draw(state)
        return presence_loss(state.logits(images), wanted)

    return step


def presence_batches(
    slices: PresenceSlices, *, batch: int, augment: Augmentation | None = None
) -> Callable[[State], tuple[Tensor, Tensor]]:
    """Draws slices evenly by label (`trainers.data.sampling_weights`).

    Augmentation moves little, so what was on a slice is taken to be on it still.

    Args:
        slices: What is drawn from.
        batch: Slices of a batch.
        augment: Random changes; None = none.

    Returns:
        Gives (B, 1, S, S) float32 images in 0..1 and (B, L) float32, 1 = present, 0 = absent, nan = unknown,
        on the device of the state, drawn by its generator.
    """
    weights = torch.from_numpy(sampling_weights(slices, classes=slices.table.shape[1]))
    table = torch.from_numpy(slices.table)

    def draw(state: State) -> tuple[Tensor, Tensor]:
        drawn = torch.multinomial(weights, batch, replacement=True, generator=state.generator)
        images = torch.from_numpy(slices.take(drawn.numpy())[0])[:, None].to(state.device).float() / 255.0
        if augment is not None:
            images, _ = augment(images, torch.zeros_like(images), state.generator)
        return images, table[drawn].to(state.device)

    return draw


def presence_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """The binary focal loss, as a review of SAM-Mix (arXiv 2412.08575) reports it.

    Gamma 2 and no class weights are this project's own choice, since slices are drawn evenly by label.

    Args:
        logits: (B, L) float32.
        wanted: (B, L) float32, 1 = present, 0 = absent; nan = unknown, left out of the mean.
    """
    from monai.losses import FocalLoss

    known = ~wanted.isnan()
    loss: Tensor = FocalLoss(gamma=2.0, reduction="none")(logits, wanted.nan_to_num()) * known
    return loss.sum() / known.sum().clamp(min=1)
