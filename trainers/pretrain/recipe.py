"""The numbers of the bundled model's training, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the bundled model is trained.

    Args:
        synthetic: Number of images made by code in the pool.
        batch: Crops a step.
        corrected: How many of them are crops of the previous step with one more corrective click.
        rate: Peak learning rate.
        warmup: Steps of linear warm-up.
        decay: Weight decay.
        average: Decay of the weight average (EMA) that is shipped.
        synthetic_share: Share of crops from images made by code, where there are real ones.
        whole_share: Share of objects that are all parts at once, in made images of alike parts.
        pseudo_share: Share of pseudo-objects among the crops of real images.
        box_share: Share of crops prompted with a box.
        mask_share: Share prompted with a neighbour-like mask and its box; the rest are clicks.
        jitter: Greatest move of a box side as a fraction of the box's side.
    """

    synthetic: int = 20_000
    batch: int = 10
    corrected: int = 5
    rate: float = 1.5e-3
    warmup: int = 60
    decay: float = 0.02
    average: float = 0.998
    synthetic_share: float = 0.5
    whole_share: float = 0.4
    pseudo_share: float = 0.33
    box_share: float = 0.45
    mask_share: float = 0.22
    jitter: float = 0.2

    def as_dict(self) -> dict[str, float]:
        """All numbers by name."""
        return asdict(self)
