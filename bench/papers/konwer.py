"""The table of Konwer et al. (arXiv:2503.04639): does ordinal feedback improve a SAM tuned on few labels?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.papers import konwertable, report
from bench.papers.coarse import BOX_SOURCES, BoxSource
from bench.papers.konwerrows import BASE, ROWS, THEIRS, outcomes
from bench.papers.pictures import draw_curves
from bench.papers.policy import Stages, Start
from bench.papers.records import Outcome
from bench.papers.sammix import only
from bench.papers.sets import LabelledSet, Sample
from bench.papers.split import Split
from bench.papers.study import Study
from sam_infer.errors import InputError

#: Shares of the images to learn from: labelled, and asked about in stage 2.
LABELLED, SHARES = 0.1, (0.1, 0.2, 0.4)
_QUICK = Stages(first=4, second=3, batch=4)
_DRAWN = (BASE, "threshold", "best", THEIRS, "predicted", "random", "supervised")
#: To be raised with every change of these rows' code that changes figures.
_VERSION = 1


def run(study: Study, args: argparse.Namespace, options: Mapping[str, Any]) -> str:
    """Run what is missing, write table, figures and pictures, and return the table."""
    report.sam_of(study)
    boxes: BoxSource = args.prompts
    stages = _QUICK if args.quick else Stages()
    data, split = one_label(study.data, study.split, args.label)
    labelled, counts = numbers(len(split.train), options["labelled"])
    study = study.extended("konwer", _VERSION, stages, boxes, labelled, data=data, split=split)
    names = {row.name for row in report.chosen_rows(ROWS, args, base=BASE)}
    rows = [row for row in ROWS if row.name in names]
    titles = {row.name: row.title for row in rows}
    starts = [
        Start(study, stages, labelled=labelled, boxes=boxes, seed=seed) for seed in range(options["seeds"])
    ]
    done: list[Outcome] = []
    text, lines = "", []
    for new in outcomes(starts, rows, counts):
        done += new
        lines = konwertable.lines(done, list(titles), BASE)
        text = f"{konwertable.table(lines, titles)}\n{konwertable.words(starts, boxes)}"
        report.write(study.out / "konwer", text, {"lines": lines})
    shown = {name: titles[name].strip("*") for name in _DRAWN if name in titles}
    path = study.out / "konwer_curves.png"
    draw_curves(path, lines, shown, over="images of stage 2", level=(BASE, "threshold"))
    middle = counts[len(counts) // 2]
    first = [one for one in done if one.seed == 0 and one.n in (0, middle)]
    paper = THEIRS if THEIRS in titles else BASE
    report.picture(study, "konwer", first, shown, paper=paper, boxes=starts[0].boxes)
    return text


def one_label(data: LabelledSet, split: Split, label: str | None) -> tuple[LabelledSet, Split]:
    """A set of one label alone, and of the images that hold it.

    Args:
        data: The set.
        split: Its parts.
        label: The label's name; None = the set's only one.

    Raises:
        InputError: When there is no such label, or no such image in one of the parts.
    """
    if (label is None and len(data.labels) > 1) or (label is not None and label not in data.labels):
        raise InputError("label", label, f"choose one of {', '.join(data.labels)}")
    name = label or next(iter(data.labels))
    value = data.labels[name]

    def holding(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return only(tuple(sample for sample in samples if value in sample.present), value)

    kept = Split(train=holding(split.train), test=holding(split.test))
    if len(kept.train) < 3 or not kept.test:
        raise InputError(
            "label", name, "too few images hold it: three to learn from and one to test are needed"
        )
    return replace(data, labels={name: value}, samples=holding(data.samples)), kept


def numbers(images: int, labelled: Sequence[int] | None) -> tuple[int, list[int]]:
    """How many images are labelled, and how many are asked about in stage 2.

    Args:
        images: To learn from.
        labelled: What the command line says; None = `LABELLED` of the images, at least two.
    """
    known = labelled[0] if labelled else max(2, round(LABELLED * images))
    if not 0 < known < images:
        raise InputError("labelled", known, f"label 1 to {images - 1} of the images outside the test part")
    return known, sorted({min(max(1, round(share * images)), images - known) for share in SHARES})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", choices=BOX_SOURCES, default=BOX_SOURCES[0], help="where boxes come from (konwer)"
    )


PAPER = report.Paper(
    name="konwer", run=run, engine="sam_tiny", defaults={"labelled": None}, arguments=_arguments
)
