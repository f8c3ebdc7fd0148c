"""The one training loop: every trainer brings a step that returns a loss, the loop does the rest.

AdamW, linear warm-up and cosine decay, an exponential moving average of the weights (what is kept in the
end), a budget in iterations and minutes, progress, and checkpoints. With the same seed, data and number of
threads a run on the CPU gives the same weights, killed and continued or not, as long as the time budget does
not shorten it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from trainers.checkpoint import Checkpoint

#: Share of the time budget after which it may shorten the schedule: too early it would only add noise.
TRUST = 0.1
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Args:
        iterations: Optimiser steps.
        max_seconds: The run ends after this time even where steps are left; the learning rate is brought
            down in time.
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW.
        warmup: Share of the run in which the rate rises from zero.
        ema: Decay of the moving average of the weights per step, in the long run; 0 = none.
        seed: Of everything random.
        device: "cpu", "cuda" or "cuda:0".
        epochs: Number of equal parts after which progress is told.
        clip: Largest norm of the gradient.
        precision: "float32", or "bfloat16" for the network's products, where the processor is faster with it.
    """

    iterations: int = 400
    max_seconds: float = 600.0
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    warmup: float = 0.1
    ema: float = 0.98
    seed: int = 0
    device: str = "cpu"
    epochs: int = 20
    clip: float = 5.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.epochs < 1:
            raise ValueError(f"iterations and epochs must be 1 or more: {self.iterations}, {self.epochs}")
        if not (self.learning_rate > 0 and self.max_seconds > 0 and 0 <= self.ema < 1):
            raise ValueError("learning_rate and max_seconds must be positive, ema in 0..1 without 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision = {self.precision!r}: choose one of {', '.join(PRECISIONS)}")


@dataclass(kw_only=True)
class State:
    """What a step sees.

    Args:
        network: Being trained.
        average: The moving average of its weights, which nothing trains; the network itself without one.
        generator: On the CPU; the only source of randomness.
        precision: See `Settings`.
        iteration: From 0.
        progress: Share of the budget that is spent, 0..1.
    """

    network: nn.Module
    average: nn.Module
    generator: torch.Generator
    precision: str = "float32"
    iteration: int = 0
    progress: float = 0.0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def logits(self, images: Tensor) -> Tensor:
        """The network's float32 answer to a batch."""
        return self._run(self.network, images)

    @torch.no_grad()
    def average_logits(self, images: Tensor) -> Tensor:
        """The moving average's float32 answer to a batch, without gradient."""
        return self._run(self.average, images)

    def _run(self, network: nn.Module, images: Tensor) -> Tensor:
        narrow = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=narrow):
            out: Tensor = network(images)
        return out.float()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is told after each epoch.

    Args:
        epoch: From 1.
        epochs: In total.
        loss: Mean loss of the epoch.
        seconds: Since the start.
    """

    epoch: int
    epochs: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """The record of a run.

    Args:
        network: The result, in evaluation mode.
        iterations: Steps done.
        seconds: Wall time.
        losses: Mean loss of each epoch.
        stopped: "" or "time is up".
    """

    network: nn.Module
    iterations: int
    seconds: float
    losses: list[float] = field(default_factory=list)
    stopped: str = ""


Step = Callable[[State], Tensor]


def train(
    network: nn.Module,
    step: Step,
    settings: Settings,
    *,
    on_epoch: Callable[[Progress], None] = lambda progress: None,
    checkpoint: Checkpoint | None = None,
) -> Run:
    """Train a network.

    Args:
        network: Changed in place; moved to the device. Parameters without ``requires_grad`` do not learn.
        step: Draws a batch with ``state.generator`` and returns the loss, a scalar.
        settings: How.
        on_epoch: Called `Settings.epochs` times.
        checkpoint: Where the state is kept from time to time; a run that was killed goes on from there, and
            ends with the weights that it would have had.

    Returns:
        The record; its network is the moving average where there is one.

    Raises:
        FloatingPointError: When the loss is no longer a finite number.
    """
    network = network.to(settings.device).train()
    learning = [p for p in network.parameters() if p.requires_grad]
    # What does not learn is the same in the average, and is not kept twice.
    shared = {id(p): p for p in network.parameters() if not p.requires_grad}
    average = copy.deepcopy(network, shared).eval().requires_grad_(False) if settings.ema else network
    state = State(
        network=network,
        average=average,
        generator=torch.Generator().manual_seed(settings.seed),
        precision=settings.precision,
    )
    optimiser = torch.optim.AdamW(
        learning, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    log = _Log()
    if checkpoint is not None:
        log = _resumed(checkpoint, state, optimiser) or log
    start, stopped = time.monotonic() - log.seconds, ""
    while state.iteration < settings.iterations:
        elapsed = time.monotonic() - start
        state.progress = state.iteration / settings.iterations
        if elapsed > TRUST * settings.max_seconds:
            state.progress = max(state.progress, elapsed / settings.max_seconds)
        if state.progress >= 1.0:
            stopped = "time is up"
            break
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate(state.progress, warmup=settings.warmup)
        loss = step(state)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, settings.clip)
        optimiser.step()
        state.iteration += 1
        if settings.ema:
            _follow(average, network, decay=min(settings.ema, state.iteration / (state.iteration + 9)))
        log.pending.append(float(loss.detach()))
        if not math.isfinite(log.pending[-1]):
            raise FloatingPointError(
                f"the loss is {log.pending[-1]} at step {state.iteration}; lower learning_rate"
            )
        epoch = state.iteration * settings.epochs // settings.iterations
        if epoch > log.epoch:
            log.epoch = epoch
            log.losses.append(float(np.mean(log.pending)))
            log.pending = []
            seconds = time.monotonic() - start
            on_epoch(Progress(epoch=epoch, epochs=settings.epochs, loss=log.losses[-1], seconds=seconds))
        if checkpoint is not None and time.monotonic() - start - log.seconds >= checkpoint.every:
            log.seconds = time.monotonic() - start
            _keep(checkpoint, state, optimiser, log)
    return Run(
        network=average.eval(),
        iterations=state.iteration,
        seconds=time.monotonic() - start,
        losses=log.losses,
        stopped=stopped,
    )


@dataclass(kw_only=True)
class _Log:
    """What a run has told so far; ``seconds`` is its age at the last checkpoint."""

    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)


def _keep(checkpoint: Checkpoint, state: State, optimiser: torch.optim.Optimizer, log: _Log) -> None:
    checkpoint.save(
        {
            "network": _changing(state.network, state.network),
            "average": _changing(state.average, state.network),
            "optimiser": optimiser.state_dict(),
            "generator": state.generator.get_state(),
            "iteration": state.iteration,
            "log": asdict(log),
        }
    )


def _resumed(checkpoint: Checkpoint, state: State, optimiser: torch.optim.Optimizer) -> _Log | None:
    """Put a kept state back; None where there is none of this run."""
    kept = checkpoint.load()
    if kept is None:
        return None
    with torch.no_grad():
        for module, values in ((state.network, kept["network"]), (state.average, kept["average"])):
            for name, value in _changing(module, state.network).items():
                value.copy_(values[name])
    optimiser.load_state_dict(kept["optimiser"])
    state.generator.set_state(kept["generator"])
    state.iteration = kept["iteration"]
    return _Log(**kept["log"])


def rate(progress: float, *, warmup: float) -> float:
    """The schedule, 0..1: linear rise during ``warmup``, then half a cosine down to 1 %."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, *, decay: float) -> None:
    kept, current = _changing(average, network), _changing(network, network)
    for name, value in kept.items():
        if value.dtype.is_floating_point:
            value.lerp_(current[name], 1.0 - decay)
        else:
            value.copy_(current[name])


def _changing(module: nn.Module, network: nn.Module) -> dict[str, Tensor]:
    """What of a module's state training changes: all but the parameters of the network that do not learn."""
    still = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in still}
