"""What rows hand on and what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.papers.sets import LabelImage
from bench.papers.statistics import Judged


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Label maps of some images, and what they took.

    Args:
        maps: Image name to (H, W) uint8 label values.
        seconds: Until they were there, with all that they needed.
        clicks: That a person would have given, over all images; 0 = a network made the prompts.
    """

    maps: Mapping[str, LabelImage]
    seconds: float
    clicks: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one row gives with one draw and seed, as it is kept.

    Args:
        row: Name of the row.
        n: Labelled images.
        seed: Of the draw and of the training.
        test: Test image to its figures (`bench.papers.statistics.judge`).
        pseudo: The same of the pseudo labels, on the images that are learned from; empty without any.
        own: The same of labels that are made as the pseudo labels are, on the test images; empty where it was
            not asked.
        seconds: All that the row took, with what it shares with others.
        drawn: Images whose masks a person has drawn.
        trained: Images that the network was trained on.
        clicks: That a person would have given, over all images; a box is two.
        figures: What else a paper's table tells of the row, by name; plain JSON.
        predictions: Test image to its predicted labels.
    """

    row: str
    n: int
    seed: int
    test: Mapping[str, Judged]
    pseudo: Mapping[str, Judged] = field(default_factory=dict)
    own: Mapping[str, Judged] = field(default_factory=dict)
    seconds: float
    drawn: int
    trained: int
    clicks: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)
    predictions: Mapping[str, LabelImage] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One annotated image.

    Args:
        labels: (H, W) uint8 label values.
        clicks: That the annotator gave.
        seconds: That it took.
    """

    labels: LabelImage
    clicks: int
    seconds: float
