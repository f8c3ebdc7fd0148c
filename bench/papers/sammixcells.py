"""What the rows of `bench.papers.sammixrows` share: settings, a seed's classifier, a draw's tuned SAMs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bench.papers.camlooks import Look, learn_classifier, look
from bench.papers.promptedsams import Kind, Schooling, tuned
from bench.papers.report import sam_of
from bench.papers.sets import Sample
from bench.papers.split import Split, draw_labelled
from bench.papers.study import Study
from sam_infer.networks.classifier import ClassifierModel, load_classifier, save_classifier
from sam_infer.prompts.activation import THRESHOLD
from sam_infer.tuning.tunedfile import TunedSam
from sam_infer.types import Prompts
from trainers.mixsteps import central_prompts


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Settings of the table; but for the threshold, which is that of the authors' later code, own choices.

    Args:
        threshold: Least value of the activation map in what prompts.
        looks: Steps of the classifier's training.
        schooling: How SAMs are tuned.
    """

    threshold: float = THRESHOLD
    looks: int = 200
    schooling: Schooling = field(default_factory=Schooling)


class Turn:
    """One seed: the classifier, and what it says of each image, made once.

    Args:
        study: Of one label; its key tells the settings apart. Networks are kept in it.
        mix: The settings.
        seed: Of all trainings and draws.
        shifted: Images of another set, tested on too.
    """

    def __init__(self, study: Study, mix: Mix, *, seed: int, shifted: tuple[Sample, ...] = ()) -> None:
        self.study, self.mix, self.seed, self.shifted = study, mix, seed, shifted
        self.base = sam_of(study)
        #: Rows are kept apart by the shifted images too, which no network learns from.
        self.rows = study.extended([(s.name, s.digest) for s in shifted])
        self._looks: dict[str, Look] = {}

    @cached_property
    def classifier(self) -> ClassifierModel:
        """Trained on the image-level labels of all images outside the test part."""
        study, count = self.study, len(self.study.split.train)
        path = study.out / "networks" / f"cam-{self.seed}-{study.key('cam', count, self.seed)}.safetensors"
        if not path.is_file():
            made = learn_classifier(
                study.split.train,
                labels=study.data.labels,
                steps=self.mix.looks,
                precision=study.recipe.precision,
                seed=self.seed,
            )
            save_classifier(path, made)
        return load_classifier(path)

    def look(self, sample: Sample) -> Look:
        """What the classifier says of an image."""
        if sample.digest not in self._looks:
            self._looks[sample.digest] = look(self.classifier, sample, threshold=self.mix.threshold)
        return self._looks[sample.digest]

    def looks(self, samples: Sequence[Sample]) -> dict[str, Look]:
        """What the classifier says of images, by name."""
        return {sample.name: self.look(sample) for sample in samples}

    def learned_from(self, sample: Sample) -> Prompts:
        """What a training image is prompted with; the middle half where the map shows nothing."""
        return self.look(sample).prompts or central_prompts(*sample.size)


class Cell:
    """One draw of masks with one seed.

    Args:
        turn: What all draws of a seed share.
        n: Images with masks, all of which hold the label.
    """

    def __init__(self, turn: Turn, n: int) -> None:
        self.turn, self.n, self.seed = turn, n, turn.seed
        self.study = turn.rows
        self.labelled = draw_positive(turn.study.split, n, turn.seed)

    def tuned(self, kind: Kind) -> TunedSam:
        """The SAM that learned from the draw's masks."""
        turn = self.turn
        prompts = {sample.name: turn.learned_from(sample) for sample in self.labelled}
        return tuned(
            turn.study, turn.base, kind, self.labelled, prompts,
            schooling=turn.mix.schooling, seed=turn.seed,
        )  # fmt: skip


def draw_positive(split: Split, n: int, seed: int) -> tuple[Sample, ...]:
    """Images to learn masks from, drawn from those outside the test part that hold the label."""
    there = tuple(sample for sample in split.train if sample.present)
    if n >= len(there):
        return there
    return draw_labelled(Split(train=there, test=split.test), n, seed).labelled
