"""What every trainer stands on: labels, windows, split, augmentation, prepared slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_infer.networks.unet import SIZE
from sam_infer.volumes import read_image
from trainers.augment import Augmentation
from trainers.data import Case, Datastore, ReadImage, WindowFor, accepted_cases
from trainers.slicestore import SliceStore
from trainers.split import is_held_out


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The cases of a datastore, divided. No case whose name is held out is in another part.

    Args:
        training: Accepted, trained on.
        held_out: Accepted, never trained on.
        unlabelled: Ids of those without an accepted label, sorted.
    """

    training: list[Case]
    held_out: list[Case]
    unlabelled: list[str]


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What all trainers of a project share.

    Args:
        model_dir: Where served weights, ledgers, histories, statistics and prepared slices lie.
        labels: Label name to value in the label maps, 1..254, gaps allowed.
        window_for: The window of an image for a request; the one that serving uses.
        window: The same policy in words and numbers, for the weights' record.
        read: How an image file is read.
        size: Longest side in pixels of what networks see; a multiple of 16.
        held_out: Share of the cases (or groups) that is never trained on.
        group: Regular expression for what must stay together in the split; see `trainers.split`.
        minimum: Training cases needed.
        augmentation: Random changes while training.
        iterations: Default number of optimiser steps.
        threads: CPU threads used while training.
    """

    model_dir: Path
    labels: Mapping[str, int]
    window_for: WindowFor
    window: Mapping[str, Any] = field(default_factory=dict)
    read: ReadImage = read_image
    size: int = SIZE
    held_out: float = 0.25
    group: str | None = None
    minimum: int = 3
    augmentation: Augmentation = field(default_factory=Augmentation)
    iterations: int = 400
    threads: int = 1

    def is_held_out(self, case_id: str) -> bool:
        """Whether a case is never trained on."""
        return is_held_out(case_id, fraction=self.held_out, group=self.group)

    def split(self, datastore: Datastore) -> Parts:
        """All cases of a datastore, divided."""
        accepted = accepted_cases(datastore)
        return Parts(
            training=[c for c in accepted if not self.is_held_out(c.case_id)],
            held_out=[c for c in accepted if self.is_held_out(c.case_id)],
            unlabelled=[n for n in sorted(datastore.get_unlabeled_images()) if not self.is_held_out(n)],
        )

    def slices(self) -> SliceStore:
        """Cases as training slices."""
        return SliceStore(
            folder=self.model_dir / "slices",
            labels=self.labels,
            size=self.size,
            window_for=self.window_for,
            window=self.window,
            read=self.read,
        )
