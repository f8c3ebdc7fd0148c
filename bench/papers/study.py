"""A study: a set, its split, how trainings are run, and the finished rows, which are kept as files.

A row's file is named by a hash of all that its figures follow from; a study that was stopped goes on where it
was, and tables are built again at no cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import numpy as np

from bench.papers.learners import Learned, Recipe
from bench.papers.records import Annotation, Outcome
from bench.papers.sets import LabelImage, LabelledSet, Sample
from bench.papers.split import Split
from bench.papers.statistics import Judged, judge, mean_dice
from sam_infer.embeddings import SliceEncoder
from sam_infer.files import write_atomic
from sam_infer.networks.unet import load_unet, save_unet
from sam_infer.types import BoolArray, Candidates, Prompts

#: To be raised with every change of the code that changes figures.
VERSION = 1


class Study:
    """What all rows of a table share.

    Args:
        data: The set.
        split: Its parts.
        recipe: How U-Nets are trained.
        encoder: The promptable engine behind its caches.
        out: Folder for rows, networks, tables and pictures.
        tell: Is told what was done.
        also: What else the figures of a paper's rows follow from: settings of its own, as `repr` writes them.
    """

    def __init__(
        self,
        *,
        data: LabelledSet,
        split: Split,
        recipe: Recipe,
        encoder: SliceEncoder,
        out: Path,
        tell: Callable[[str], None] = print,
        also: tuple[object, ...] = (),
    ) -> None:
        self.data = data
        self.split = split
        self.recipe = recipe
        self.encoder = encoder
        self.out = out
        self.tell = tell
        self.also = also
        self.annotations: dict[tuple[str, str], Annotation] = {}

    def extended(self, *also: object, data: LabelledSet | None = None, split: Split | None = None) -> Study:
        """The same with more that its figures follow from, or of another set."""
        return Study(
            data=data or self.data,
            split=split or self.split,
            recipe=self.recipe,
            encoder=self.encoder,
            out=self.out,
            tell=self.tell,
            also=(*self.also, *also),
        )

    def key(self, name: str, n: int, seed: int) -> str:
        """Hash of all that a row's figures follow from."""
        parts = (
            VERSION,
            asdict(self.recipe),
            sorted(self.data.labels.items()),
            [(s.name, s.group, s.digest) for s in (*self.split.train, *self.split.test)],
            len(self.split.test),
            self.encoder.engine.fingerprint,
            (name, n, seed),
            *self.also,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def outcome(self, name: str, n: int, seed: int, make: Callable[[], Outcome]) -> Outcome:
        """A row's outcome: from its file, or made and kept."""
        path = self.out / "rows" / f"{name}-{n}-{seed}-{self.key(name, n, seed)}.json"
        if path.is_file():
            kept = json.loads(path.read_text())
            with np.load(path.with_suffix(".npz")) as arrays:
                return Outcome(**kept, predictions={name: arrays[name] for name in arrays.files})
        made = make()
        buffer = BytesIO()
        np.savez_compressed(buffer, **{k: np.asarray(v) for k, v in made.predictions.items()})
        write_atomic(path.with_suffix(".npz"), buffer.getvalue())
        record = {k: v for k, v in vars(made).items() if k != "predictions"}
        write_atomic(path, json.dumps(record).encode())
        what, dice = ("test", made.test) if made.test else ("label", made.pseudo)
        self.tell(f"{name}, n = {n}, seed {seed}: {what} Dice {mean_dice(dice):.3f}, {made.seconds:.0f} s")
        return made

    def learned(self, name: str, n: int, seed: int, make: Callable[[], Learned]) -> Learned:
        """A network that several rows share: from its file, or trained and kept."""
        path = self.out / "networks" / f"{name}-{n}-{seed}-{self.key(name, n, seed)}.safetensors"
        if path.is_file():
            model = load_unet(path)
            return Learned(model=model, seconds=float(model.training["seconds"]))
        made = make()
        save_unet(path, made.model)
        return made

    def judged(
        self, maps: Mapping[str, LabelImage], samples: tuple[Sample, ...], *, distance: bool
    ) -> dict[str, Judged]:
        """Figures of label maps against the samples' truth."""
        return {s.name: judge(maps[s.name], s.truth, self.data.labels, distance=distance) for s in samples}

    def tested(self, learned: Learned) -> dict[str, LabelImage]:
        """A network's labels of the test images."""
        return {sample.name: learned.predict(sample) for sample in self.split.test}


def masks_of(labels: LabelImage) -> dict[int, BoolArray]:
    """(H, W) bool by value, of the labels that occur."""
    return {int(value): labels == value for value in np.unique(labels) if value}


def decoder(study: Study, sample: Sample) -> Callable[[Sequence[Prompts]], list[Candidates]]:
    """The study's engine on an image: the whole of it, as the papers have it."""

    def decode(prompts: Sequence[Prompts]) -> list[Candidates]:
        return study.encoder.decode(sample.image, 0, sample.window, prompts)

    return decode
