"""The training loop: resumable after a kill, the same on a GPU and a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from sam_infer.networks.promptchannels import CropBatch, prompt_channels
from sam_infer.networks.promptnet import PromptNet
from trainers.pretrain.correct import corrected
from trainers.pretrain.recipe import Recipe
from trainers.pretrain.sampler import Drawn, Sampler, stack


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one call of `train` does.

    Args:
        out: Folder of the checkpoint.
        steps: Steps of the whole training; sets the learning rate's cosine.
        minutes: Wall time of the whole training, resumed parts added up; ends it where it comes first
            and sets the cosine too. None for no limit.
        seed: Of the first weights and of every sample.
        device: Torch device.
        workers: Processes that draw samples; 0 draws them in this process.
        save_every: Seconds between checkpoints.
        stop_at: Leave after this step without ending the schedule, as a kill would; for tests.
        start: A weight file to go on from where there is no checkpoint; the network may be deeper
            (`PromptNet.grow_from`). None for random weights.
        bfloat16: Compute the network in bfloat16, weights and losses in float32. About twice as fast on
            a processor with matrix instructions for it.
    """

    out: Path
    steps: int
    minutes: float | None = None
    seed: int = 0
    device: str = "cpu"
    workers: int = 1
    save_every: float = 60.0
    stop_at: int | None = None
    start: Path | None = None
    bfloat16: bool = False


def train(sampler: Sampler, recipe: Recipe, plan: Plan) -> tuple[dict[str, Tensor], list[float]]:
    """Train until the plan's end, from the checkpoint in its folder where there is one.

    Args:
        sampler: Gives ``recipe.batch - recipe.corrected`` crops a step.
        recipe: Optimiser's numbers.
        plan: Length, place and device.

    Returns:
        The averaged weights by name, and the losses of the steps of this call.
    """
    torch.manual_seed(plan.seed)
    model = PromptNet()
    if plan.start is not None:
        model.grow_from({name: value.float() for name, value in load_file(plan.start).items()})
    model = model.to(plan.device)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=recipe.decay
    )
    step, elapsed, carried = 0, 0.0, None
    path = plan.out / "checkpoint.pt"
    if path.is_file():
        saved = torch.load(path, map_location=plan.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step, elapsed = saved["average"], saved["step"], saved["elapsed"]
        carried = _unpack(saved["carried"])
        print(f"resumed at step {step}", flush=True)
    losses: list[float] = []
    began, saved_at = time.monotonic() - elapsed, time.monotonic()
    end = plan.steps if plan.stop_at is None else min(plan.stop_at, plan.steps)
    for fresh in _batches(sampler, step, end, plan.workers):
        progress = _progress(step, time.monotonic() - began, plan)
        if progress >= 1:
            break
        rate = recipe.rate * min((step + 1) / recipe.warmup, 1.0) * 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = float(max(rate, 1e-2 * recipe.rate))
        batch = fresh if carried is None else stack([fresh, carried])
        loss, logits = _update(model, optimiser, batch, plan)
        _track(average, model, min(recipe.average, (step + 1) / (step + 10)))
        carried = corrected(batch, logits, recipe.corrected, np.random.default_rng([plan.seed, 4, step]))
        step += 1
        losses.append(loss)
        if step % 50 == 0:
            spent = (time.monotonic() - began) / 60
            print(f"step {step}  {spent:.1f} min  loss {np.mean(losses[-50:]):.4f}", flush=True)
        if time.monotonic() - saved_at > plan.save_every:
            _save(path, model, optimiser, average, step, time.monotonic() - began, carried)
            saved_at = time.monotonic()
    if losses:
        _save(path, model, optimiser, average, step, time.monotonic() - began, carried)
    return {name: value.cpu() for name, value in average.items()}, losses


def loss_of(logits: Tensor, iou: Tensor, batch: Drawn) -> Tensor:
    """2 BCE + Dice + squared error of the predicted IoU, mean over crops.

    Args:
        logits: (B, S, S) float32, > 0 is foreground.
        iou: (B,) float32 in 0..1, predicted.
        batch: Truths on the same device.
    """
    truth = batch.truth
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    share = torch.sigmoid(logits)
    both, total = (share * truth).sum((1, 2)), share.sum((1, 2)) + truth.sum((1, 2))
    dice = 1 - (2 * both + 1) / (total + 1)
    with torch.no_grad():
        mask = logits > 0
        common = (mask * truth).sum((1, 2))
        real = common / (mask.sum((1, 2)) + truth.sum((1, 2)) + batch.beyond - common).clamp_min(1)
    return (2 * entropy + dice + (iou - real).square()).mean()


def _update(
    model: PromptNet, optimiser: torch.optim.Optimizer, batch: Drawn, plan: Plan
) -> tuple[float, Tensor]:
    device = plan.device
    on = Drawn(crops=batch.crops.to(device), truth=batch.truth.to(device), beyond=batch.beyond.to(device))
    inputs = prompt_channels(on.crops)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=plan.bfloat16):
        logits, iou = model(inputs)
    loss = loss_of(logits, iou.float(), on)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach()), logits.detach().cpu()


def _batches(sampler: Sampler, start: int, end: int, workers: int) -> Iterator[Drawn]:
    loader = DataLoader(
        sampler, batch_size=None, sampler=_Range(start, end), num_workers=workers,
        prefetch_factor=6 if workers else None, worker_init_fn=_polite,
    )  # fmt: skip
    yield from loader


class _Range(SequentialSampler):
    def __init__(self, start: int, end: int) -> None:
        self.steps = range(start, end)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def _polite(_: int) -> None:
    os.nice(1)
    torch.set_num_threads(1)


def _progress(step: int, seconds: float, plan: Plan) -> float:
    by_time = 0.0 if plan.minutes is None else seconds / 60 / plan.minutes
    return max(step / plan.steps, by_time)


@torch.no_grad()
def _track(average: dict[str, Tensor], model: PromptNet, decay: float) -> None:
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def _pack(drawn: Drawn | None) -> dict[str, Tensor]:
    if drawn is None:
        return {}
    return {**vars(drawn.crops), "truth": drawn.truth, "beyond": drawn.beyond}


def _unpack(packed: dict[str, Tensor]) -> Drawn | None:
    if not packed:
        return None
    packed = {name: value.cpu() for name, value in packed.items()}
    truth, beyond = packed.pop("truth"), packed.pop("beyond")
    return Drawn(crops=CropBatch(**packed), truth=truth, beyond=beyond)


def _save(
    path: Path, model: PromptNet, optimiser: Any, average: Any, step: int, elapsed: float, carried: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(), "optimiser": optimiser.state_dict(), "average": average, "step": step,
        "elapsed": elapsed, "carried": _pack(carried),
    }  # fmt: skip
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
