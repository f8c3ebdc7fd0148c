"""What the trainers of the served U-Net share: its network, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam_infer.networks.unet import CHANNELS, UnetModel, build_unet, load_unet, save_unet
from trainers.basis import Basis, Parts
from trainers.evaluate import Score, evaluate
from trainers.modelrecipe import NetworkRecipe, Trained
from trainers.round import Plan

__all__ = ["Trained", "UnetRecipe"]


class UnetRecipe(NetworkRecipe[UnetModel]):
    """A trainer whose result may become the served U-Net: judged by Dice on the held-out cases.

    Args:
        basis: What it stands on.
        name: Of the trainer.
        description: For people.
        warm: Whether rounds start from the served weights by default.
    """

    def __init__(self, basis: Basis, *, name: str, description: str, warm: bool) -> None:
        super().__init__(basis, name=name, served="unet", description=description, warm=warm)

    def build(self) -> Any:
        """An untrained network; whoever calls it sets the seed."""
        return build_unet(labels=len(self.basis.labels))

    def model(self, network: Any, training: Mapping[str, Any]) -> UnetModel:
        """A network with what using it needs."""
        return UnetModel(
            network=network,
            labels=self.basis.labels,
            size=self.basis.size,
            window=self.basis.window,
            training=training,
        )

    def _load(self, path: Path, device: str) -> UnetModel:
        return load_unet(path, device=device)

    def _save(self, path: Path, model: UnetModel) -> None:
        save_unet(path, model)

    def _continues(self, model: UnetModel, plan: Plan) -> bool:
        return model.channels == CHANNELS

    def _score(self, model: UnetModel, parts: Parts) -> Score:
        return evaluate(model, parts.held_out, window_for=self.basis.window_for, read=self.basis.read)
