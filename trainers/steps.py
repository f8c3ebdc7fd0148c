"""What one optimiser step of each kind of training does: draws a batch, returns the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainers.augment import Augmentation
from trainers.data import SliceSource, sampling_weights
from trainers.loop import State, Step


def supervised_step(
    slices: SliceSource, *, classes: int, batch: int = 8, augment: Augmentation | None = None
) -> Step:
    """The step of plain supervised training.

    Args:
        slices: What is trained on; drawn with `sampling_weights`.
        classes: Number of labels without background.
        batch: Slices per step.
        augment: Random changes; None = none.

    Returns:
        A step whose loss is Dice (over the batch, without background) plus cross entropy.
    """
    from monai.losses import DiceCELoss

    criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    weights = torch.from_numpy(sampling_weights(slices, classes=classes))

    def step(state: State) -> Tensor:
        images, labels = draw(slices, weights, batch, state)
        if augment is not None:
            images, labels = augment(images, labels, state.generator)
        loss: Tensor = criterion(state.logits(images), labels)
        return loss

    return step


def mean_teacher_step(
    slices: SliceSource,
    unlabelled: SliceSource,
    *,
    classes: int,
    batch: int = 8,
    augment: Augmentation | None = None,
    weight: float = 0.1,
    noise: float = 0.1,
    quiet: float = 1 / 30,
) -> Step:
    """The step of the mean teacher: what is unlabelled is to be seen as the moving average sees it.

    As published code of SSL4MIS has it (Tarvainen and Valpola, 2017, in two dimensions): half of a batch is
    labelled; the loss of the other half is the mean squared difference of the *probabilities* of student and
    teacher, of which the teacher sees a noisier image; its weight rises as exp(-5 (1 - x)^2) over the whole
    run and is zero in the first thirtieth. The supervised loss is the one of `supervised_step`.

    Args:
        slices: Labelled; drawn with `sampling_weights`.
        unlabelled: Their labels are not looked at; each is as likely as another.
        classes: Number of labels without background.
        batch: Slices per step, half of them labelled, at least 2.
        augment: Random changes, the same for student and teacher; None = none.
        weight: Of the consistency, in the end.
        noise: Standard deviation of the teacher's noise in grey values 0..1, cut off at twice this.
        quiet: Share of the run without consistency.

    Returns:
        A step; run it with a moving average (`trainers.loop.Settings.ema`), which is the teacher.
    """
    from monai.losses import DiceCELoss

    criterion = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    weights = torch.from_numpy(sampling_weights(slices, classes=classes))
    equal = torch.ones(len(unlabelled), dtype=torch.float64)
    known = max(1, batch // 2)

    def step(state: State) -> Tensor:
        parts = (draw(slices, weights, known, state), draw(unlabelled, equal, max(1, batch - known), state))
        images, labels = (torch.cat(pair) for pair in zip(*parts, strict=True))
        if augment is not None:
            images, labels = augment(images, labels, state.generator)
        logits = state.logits(images)
        loss: Tensor = criterion(logits[:known], labels[:known])
        grain = torch.randn(images[known:].shape, generator=state.generator).to(images.device)
        if state.progress < quiet:
            return loss
        blurred = images[known:] + (grain * noise).clamp(-2 * noise, 2 * noise)
        taught = state.average_logits(blurred).softmax(1)
        share = weight * math.exp(-5.0 * (1.0 - state.progress) ** 2)
        return loss + share * (logits[known:].softmax(1) - taught).square().mean()

    return step


def draw(slices: SliceSource, weights: Tensor, count: int, state: State) -> tuple[Tensor, Tensor]:
    """A batch at random: images (count, 1, S, S) float32 in 0..1, and channels of labels as float32."""
    drawn = torch.multinomial(weights, count, replacement=True, generator=state.generator).numpy()
    images, labels = (torch.from_numpy(a)[:, None].to(state.device).float() for a in slices.take(drawn))
    return images / 255.0, labels
