"""Rows of Ward and Imran, SAM-Mix (arXiv:2412.08575), with every control beside them, and oracles apart.

A classifier of image-level labels looks for an organ; the box of what stands out in its activation map
prompts a SAM that learned from a few masks. Boxes of the truth prompt in `ORACLES` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from bench.papers.camlooks import Look, box_overlap, learn_classifier, look, true_box
from bench.papers.learners import learn, truths
from bench.papers.promptedsams import Kind, Schooling, answering, given_as, tuned
from bench.papers.records import Outcome
from bench.papers.report import sam_of
from bench.papers.rows import Row, outcome_of
from bench.papers.sets import LabelImage, Sample
from bench.papers.split import Split, draw_labelled
from bench.papers.statistics import judge, mean_dice
from bench.papers.study import Study
from sam_infer.networks.classifier import ClassifierModel, load_classifier, save_classifier
from sam_infer.prompts.activation import THRESHOLD
from sam_infer.tuning.tunedfile import TunedSam
from sam_infer.types import BoolArray, Prompts
from trainers.mixsteps import central_prompts

BASE, THEIRS = "unet", "attention"
Answer = Callable[[Sample], BoolArray]


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


def outcomes(
    turns: Sequence[Turn], rows: Sequence[Row[Cell]], *, labelled: Sequence[int]
) -> Iterator[list[Outcome]]:
    """Run rows for all seeds and numbers of masks; gives what is new after each of these.

    Args:
        turns: The seeds.
        rows: Of `ROWS` and `ORACLES`.
        labelled: Numbers of images with masks. Ablations are run at one of them, with the first seed.
    """
    at = set(turns[0].study.data.defaults.ablated) & set(labelled) or {labelled[-1]}
    for turn in turns:
        for number, n in enumerate(labelled):
            cell = Cell(turn, n)
            wanted = [
                row
                for row in rows
                if not (row.once and number) and not (row.ablation and (turn.seed or n not in at))
            ]
            yield [
                turn.rows.outcome(
                    row.name, 0 if row.once else n, turn.seed, partial(row.make, row.name, cell)
                )
                for row in wanted
            ]


def _unet(name: str, cell: Cell) -> Outcome:
    study = cell.turn.study

    def make() -> Any:
        return learn(
            cell.labelled,
            truths(cell.labelled),
            labels=study.data.labels,
            recipe=study.recipe,
            seed=cell.seed,
        )

    learned = study.learned(name, cell.n, cell.seed, make)
    return _tested(
        name, cell, lambda s: learned.predict(s) > 0, seconds=learned.seconds, gated=False, boxed=False
    )


def _prompted(name: str, cell: Cell, *, kind: Kind | None) -> Outcome:
    """The box of the activation map prompts the SAM as it is (None), or one tuned on the masks."""
    answer, seconds = _answer(cell, kind, lambda s: cell.turn.look(s).prompts)
    seconds += float(cell.turn.classifier.training["seconds"])
    return _tested(name, cell, answer, seconds=seconds, gated=True, boxed=True, masks=kind is not None)


def _bare(name: str, cell: Cell) -> Outcome:
    answer, seconds = _answer(cell, "bare", lambda sample: Prompts())
    return _tested(name, cell, answer, seconds=seconds, gated=False, boxed=False)


def _oracle(name: str, cell: Cell, *, kind: Kind | None) -> Outcome:
    """The true box prompts: what boxes cost, and no result that could be had without the truth."""
    model = None if kind is None else cell.tuned(kind)
    encoder, start = answering(cell.turn.study, cell.turn.base, model), time.monotonic()

    def answer(sample: Sample) -> BoolArray:
        box = true_box(sample)
        return _asked(encoder, sample, None if box is None else Prompts(box=box))

    test = {s.name: answer(s) for s in cell.study.split.test}
    seconds = time.monotonic() - start + (0.0 if model is None else float(model.training["seconds"]))
    there = [s for s in cell.turn.shifted if s.present]
    figures = {"box_iou": 1.0, "shifted_dice": _mean_dice(cell, there, answer), "image_labels": 0}
    return _kept(name, cell, test, seconds=seconds, masks=model is not None, figures=figures)


def _answer(
    cell: Cell, kind: Kind | None, prompts: Callable[[Sample], Prompts | None]
) -> tuple[Answer, float]:
    """A SAM that is prompted, and the seconds that it learned."""
    model = None if kind is None else cell.tuned(kind)
    encoder = answering(cell.turn.study, cell.turn.base, model)

    def answer(sample: Sample) -> BoolArray:
        given = prompts(sample)
        return _asked(encoder, sample, None if given is None else given_as(kind or "box", given))

    return answer, 0.0 if model is None else float(model.training["seconds"])


def _asked(encoder: Any, sample: Sample, given: Prompts | None) -> BoolArray:
    """(H, W) bool; without a prompt nothing is found."""
    if given is None:
        return np.zeros(sample.size, bool)
    found: BoolArray = encoder.decode(sample.image, 0, sample.window, [given], zoom=False)[0].mask()
    return found


def _tested(
    name: str, cell: Cell, answer: Answer, *, seconds: float, gated: bool, boxed: bool, masks: bool = True
) -> Outcome:
    """An outcome with what a row says of all images, and what is left of that where the label is present.

    Args:
        name: Of the row.
        cell: Its place.
        answer: What it says of an image, whether the classifier sees the label there or not.
        seconds: That its networks took.
        gated: Whether the row's own figures are those where the classifier has a say.
        boxed: Whether boxes of activation maps prompt it.
        masks: Whether it learned from the draw's masks.
    """
    turn, start = cell.turn, time.monotonic()
    test = cell.study.split.test
    plain = {sample.name: answer(sample) for sample in test}
    seconds += time.monotonic() - start
    kept = {s.name: plain[s.name] & turn.look(s).present for s in test}
    judged = {"ungated": plain, "gated": kept}
    away = [sample for sample in turn.shifted if sample.present]
    figures: dict[str, Any] = {
        **{f"{how}_dice": mean_dice(_judged(cell, test, some)) for how, some in judged.items()},
        **{f"{how}_false": _false_positives(test, some) for how, some in judged.items()},
        "shifted_dice": _mean_dice(
            cell, away, lambda s: answer(s) & (turn.look(s).present if gated else True)
        ),
        "image_labels": len(cell.study.split.train) if gated else 0,
    }
    if boxed:
        boxes = {s.name: (p.box if (p := turn.look(s).prompts) else None) for s in test}
        overlaps = [o for s in test if (o := box_overlap(boxes[s.name], s)) is not None]
        figures["box_iou"] = float(np.mean(overlaps))
    shown = kept if gated else plain
    return _kept(name, cell, shown, seconds=seconds, masks=masks, figures=figures)


def _kept(
    name: str,
    cell: Cell,
    masks_found: Mapping[str, BoolArray],
    *,
    seconds: float,
    masks: bool,
    figures: Mapping[str, Any],
) -> Outcome:
    return outcome_of(
        cell,
        name,
        {key: _as_labels(cell, mask) for key, mask in masks_found.items()},
        n=cell.n if masks else 0,
        seconds=seconds,
        drawn=len(cell.labelled) if masks else 0,
        trained=len(cell.labelled) if masks else 0,
        figures=figures,
    )


def _as_labels(cell: Cell, mask: BoolArray) -> LabelImage:
    (value,) = cell.study.data.labels.values()
    return (mask * value).astype(np.uint8)


def _judged(cell: Cell, samples: Sequence[Sample], masks: Mapping[str, BoolArray]) -> dict[str, Any]:
    labels = cell.study.data.labels
    return {
        s.name: judge(_as_labels(cell, masks[s.name]), _as_labels(cell, s.truth > 0), labels, distance=False)
        for s in samples
    }


def _mean_dice(cell: Cell, samples: Sequence[Sample], answer: Answer) -> float:
    return mean_dice(_judged(cell, samples, {sample.name: answer(sample) for sample in samples}))


def _false_positives(samples: Sequence[Sample], masks: Mapping[str, BoolArray]) -> float:
    """Share of the images without the label in which something is found; nan without any."""
    found = [bool(masks[sample.name].any()) for sample in samples if not sample.present]
    return float(np.mean(found)) if found else float("nan")


def _box(name: str, title: str, kind: Kind, *, ablation: bool = False) -> Row[Cell]:
    return Row(name=name, title=title, make=partial(_prompted, kind=kind), ablation=ablation)


ROWS: tuple[Row[Cell], ...] = (
    Row(name=BASE, title="U-Net", make=_unet),
    Row(name="frozen", title="SAM frozen, CAM box", make=partial(_prompted, kind=None), once=True),
    _box("box", "decoder tuned, CAM box", "box"),
    _box(THEIRS, "**decoder tuned, CAM box and mask**", "attention"),
    Row(name="bare", title="decoder tuned, no prompt", make=_bare),
    _box("lora", "LoRA in the encoder, CAM box and mask", "lora", ablation=True),
    _box("clinical", "decoder tuned by clinicians' prompts, CAM box", "clinical"),
)
ORACLES: tuple[Row[Cell], ...] = (
    Row(name="oracle", title="SAM frozen, true box", make=partial(_oracle, kind=None), once=True),
    Row(name="oracle-box", title="decoder tuned on CAM boxes, true box", make=partial(_oracle, kind="box")),
    Row(
        name="oracle-clinical",
        title="decoder tuned by clinicians' prompts, true box",
        make=partial(_oracle, kind="clinical"),
    ),
)
