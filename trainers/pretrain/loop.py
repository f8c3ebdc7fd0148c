"""The training loop of every shipped model: resumable after a kill, the same on a GPU and a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from trainers.pretrain.recipe import Common


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one call of `run` does.

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
        start: A weight file to go on from where there is no checkpoint. None for random weights.
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


class Learner(Protocol):
    """A network and how it learns from a batch."""

    @property
    def network(self) -> nn.Module:
        """What is trained, on the plan's device."""

    def learn(self, batch: Any, step: int) -> float:
        """Leave a batch's gradients in the network; the loss."""

    def state(self) -> dict[str, Tensor]:
        """What the next step needs beside the network."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""


def run(
    learner: Learner, sampler: Dataset[Any], rates: Common, plan: Plan
) -> tuple[dict[str, Tensor], list[float]]:
    """Train until the plan's end, from the checkpoint in its folder where there is one.

    Args:
        learner: The network and its steps.
        sampler: Gives the batch of a step by its number.
        rates: Optimiser's numbers.
        plan: Length, place and device.

    Returns:
        The averaged weights by name, and the losses of the steps of this call.
    """
    network = learner.network
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=rates.rate, betas=(0.9, 0.98), weight_decay=rates.decay
    )
    step, elapsed = 0, 0.0
    path = plan.out / "checkpoint.pt"
    if path.is_file():
        saved = torch.load(path, map_location=plan.device, weights_only=True)
        network.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step, elapsed = saved["average"], saved["step"], saved["elapsed"]
        learner.restore(saved["carried"])
        print(f"resumed at step {step}", flush=True)
    losses: list[float] = []
    began, saved_at = time.monotonic() - elapsed, time.monotonic()

    def save() -> None:
        state = {
            "model": network.state_dict(), "optimiser": optimiser.state_dict(), "average": average,
            "step": step, "elapsed": time.monotonic() - began, "carried": learner.state(),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    end = plan.steps if plan.stop_at is None else min(plan.stop_at, plan.steps)
    for batch in _batches(sampler, step, end, plan.workers):
        progress = _progress(step, time.monotonic() - began, plan)
        if progress >= 1:
            break
        rate = rates.rate * min((step + 1) / rates.warmup, 1.0) * 0.5 * (1 + np.cos(np.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = float(max(rate, 1e-2 * rates.rate))
        optimiser.zero_grad()
        losses.append(learner.learn(batch, step))
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        _track(average, network, min(rates.average, (step + 1) / (step + 10)))
        step += 1
        if step % 50 == 0:
            spent = (time.monotonic() - began) / 60
            print(f"step {step}  {spent:.1f} min  loss {np.mean(losses[-50:]):.4f}", flush=True)
        if time.monotonic() - saved_at > plan.save_every:
            save()
            saved_at = time.monotonic()
    if losses:
        save()
    return {name: value.cpu() for name, value in average.items()}, losses


def _batches(sampler: Dataset[Any], start: int, end: int, workers: int) -> Iterator[Any]:
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
def _track(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    for name, value in network.state_dict().items():
        average[name].lerp_(value, 1 - decay)
