"""What the trainers of one kind of served model share: a candidate, its champion, and the gate between."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from sam_infer.networks.modelfile import Published
from trainers.basis import Basis, Parts
from trainers.evaluate import Score
from trainers.loop import Run
from trainers.recipe import Recipe
from trainers.round import Plan, Round

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Published)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a recipe came to.

    Args:
        run: Of the loop; its network is the candidate.
        slices: Number of slices trained on.
        facts: What else statistics and ledger say.
    """

    run: Run
    slices: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class ModelRecipe(Recipe, Generic[Model]):
    """A trainer whose result may become the served model: judged on the same held-out cases by one gate.

    Args:
        basis: What it stands on.
        name: Of the trainer.
        served: Name of the weights that it publishes.
        description: For people.
        warm: Whether rounds start from the served weights by default.
    """

    def __init__(self, basis: Basis, *, name: str, served: str, description: str, warm: bool) -> None:
        super().__init__(basis, name=name, served=served, description=description)
        self._warm = warm

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {**super().config(), "warm_start": self._warm}

    @abstractmethod
    def model(self, network: Any, training: Mapping[str, Any]) -> Model:
        """A network with what using it needs."""

    @abstractmethod
    def _load(self, path: Path, device: str) -> Model:
        """Read a served model; ValueError where it cannot be used."""

    @abstractmethod
    def _save(self, path: Path, model: Model) -> None:
        """Write a model."""

    @abstractmethod
    def _continues(self, model: Model, plan: Plan) -> bool:
        """Whether training can start from a served model: its weights fit what is trained."""

    @abstractmethod
    def _train(self, now: Round, start: Model | None) -> Trained:
        """Train a network; ``start`` is the served model, where it is to be started from."""

    @abstractmethod
    def _score(self, model: Model, parts: Parts) -> Score:
        """How good a model is on the held-out cases."""

    def _figures(self, candidate: Model, parts: Parts) -> dict[str, Any]:
        """What else the statistics say of a candidate; nothing is decided by it."""
        return {}

    def _round(self, now: Round) -> dict[str, Any]:
        settings = now.plan.settings
        champion = self._champion(now.plan)
        warm = now.plan.warm and champion is not None and self._continues(champion, now.plan)
        found = self._train(now, champion if warm else None)
        training = {
            "trainer": self.name,
            "round": now.index,
            "training_cases": len(now.parts.training),
            "held_out": len(now.parts.held_out),
            "slices": found.slices,
            "seed": settings.seed,
            "iterations": found.run.iterations,
            "warm_start": warm,
            **found.facts,
        }
        candidate = self.model(found.run.network, training)
        return {
            **training,
            "total_epochs": settings.epochs,
            **self._judge(candidate, champion, now.parts, found.run),
        }

    def _judge(self, candidate: Model, champion: Model | None, parts: Parts, run: Run) -> dict[str, Any]:
        """Publish or refuse; the outcome's figures."""
        logger.info("judging on %d held-out cases", len(parts.held_out))
        new = self._score(candidate, parts)
        old = self._score(champion, parts) if champion else None
        figures = {**_named("candidate", new), **_named("champion", old), **self._figures(candidate, parts)}
        path = self.basis.model_dir / f"{self.path.stem}-candidate.safetensors"
        self._save(path, candidate)
        record = {
            **candidate.training,
            **figures,
            "training_ids": [c.case_id for c in parts.training],
            "held_out_ids": [c.case_id for c in parts.held_out],
            "seconds": round(run.seconds, 1),
            "stopped": run.stopped,
        }
        decision = self.publisher.publish(path, candidate_score=new, champion_score=old, record=record)
        served = new if decision.publish or old is None else old
        return {
            "epoch": len(run.losses),
            "loss": round(run.losses[-1], 4) if run.losses else None,
            "stopped": run.stopped,
            "published": decision.publish,
            "reason": decision.reason,
            f"candidate_{new.metric}": new.record()[new.metric],
            f"champion_{new.metric}": old.record()[new.metric] if old else None,
            "per_label": new.record()["per_label"],
            **figures,
            "best_metric": 0.0 if math.isnan(served.value) else round(served.value, 4),
        }

    def _champion(self, plan: Plan) -> Model | None:
        """The served model, where it has the project's labels; else None."""
        if not self.path.is_file():
            return None
        try:
            model = self._load(self.path, plan.settings.device)
        except ValueError as error:
            logger.warning("%s; training from scratch", error)
            return None
        # The order of the labels is that of the network's outputs.
        if list(model.labels.items()) != list(self.basis.labels.items()):
            logger.warning("the served model has labels %s; training from scratch", dict(model.labels))
            return None
        return model


class NetworkRecipe(ModelRecipe[Model]):
    """A trainer of networks that start from random weights, or from those that are served."""

    @abstractmethod
    def build(self) -> Any:
        """An untrained network; whoever calls it sets the seed."""

    def network(self, start: Model | None, seed: int) -> Any:
        """An untrained network, or one that starts from a model's weights."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build()
        if start is not None:
            network.load_state_dict(start.network.state_dict())
        return network


def _named(whose: str, score: Score | None) -> dict[str, float]:
    """What was measured beside the score, under names that say of whom."""
    return {f"{whose}_{name}": round(value, 4) for name, value in score.figures.items()} if score else {}
