"""The numbers of the shipped models' trainings, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every training is told.

    Args:
        synthetic: Number of images made by code in the pool.
        rate: Peak learning rate.
        warmup: Steps of linear warm-up.
        decay: Weight decay.
        average: Decay of the weight average (EMA) that is shipped.
        synthetic_share: Share of samples from images made by code, where there are real ones.
        together_share: Share of objects that are all parts at once, in made images of alike parts.
        pseudo_share: Share of pseudo-objects among the samples of real images.
        box_share: Share of prompts that are boxes.
        mask_share: Share that are a neighbour-like mask and its box; the rest are clicks.
        jitter: Greatest move of a box side as a fraction of the box's side.
    """

    synthetic: int = 20_000
    rate: float
    warmup: int
    decay: float = 0.02
    average: float
    synthetic_share: float = 0.5
    together_share: float = 0.4
    pseudo_share: float = 0.33
    box_share: float
    mask_share: float
    jitter: float = 0.2

    def as_dict(self) -> dict[str, float]:
        """All numbers by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(Common):
    """How the bundled model is trained.

    Args:
        batch: Crops a step.
        corrected: How many of them are crops of the previous step with one more corrective click.
    """

    batch: int = 10
    corrected: int = 5
    rate: float = 1.5e-3
    warmup: int = 60
    average: float = 0.998
    box_share: float = 0.45
    mask_share: float = 0.22


@dataclass(frozen=True, kw_only=True)
class TinyRecipe(Common):
    """How ``sam_tiny`` is trained.

    Args:
        images: Images a step.
        prompts: Prompts an image.
        corrected: How many of an image's prompts get corrective clicks.
        whole_share: Share of whole images; the rest are crops around an object.
        mask_only_share: Share of steps whose prompts are neighbour-like masks alone; the other shares of
            prompts are of the other steps.
    """

    images: int = 3
    prompts: int = 3
    corrected: int = 1
    rate: float = 1.2e-3
    warmup: int = 100
    average: float = 0.999
    box_share: float = 0.5
    mask_share: float = 0.12
    whole_share: float = 0.4
    mask_only_share: float = 0.08
