"""Which pictures are tested on, which are labelled, and which are the pool: fixed, by group, and drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.papers.sets import LabelledSet, Sample
from sam_infer.errors import InputError

TEST_SHARE = 0.25
_TRIES = 64


@dataclass(frozen=True, kw_only=True)
class Split:
    """A set in two parts.

    Args:
        train: What labelled images are drawn from; the rest of it is the pool.
        test: Never trained on, never in a pool; no group of it is in ``train``.
    """

    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of labelled images.

    Args:
        labelled: The images whose truth may be learned from.
        pool: The others of `Split.train`.
    """

    labelled: tuple[Sample, ...]
    pool: tuple[Sample, ...]


def split_set(data: LabelledSet) -> Split:
    """Put whole groups into the test part, up to a quarter of the images.

    Groups are taken in the order of their names' hashes while they fit. The first of several such orders
    counts that leaves every label on both sides and fills most of the quarter; without one, the first of all.
    """
    room = max(1, round(TEST_SHARE * len(data.samples)))
    wanted = set(data.labels.values())
    first: Split | None = None
    for salt in range(_TRIES):
        split = _split(data.samples, room, salt)
        first = first or split
        complete = all(_present(part) == wanted for part in (split.train, split.test))
        if complete and len(split.test) >= 0.8 * room:
            return split
    if first is None or not first.test or not first.train:
        raise InputError("data", data.name, "it needs images of at least four groups (patients)")
    return first


def _split(samples: Sequence[Sample], room: int, salt: int) -> Split:
    names = {sample.group for sample in samples}
    tested: set[str] = set()
    for group in sorted(names, key=lambda name: hashlib.sha256(f"{salt} {name}".encode()).digest()):
        size = sum(sample.group in tested or sample.group == group for sample in samples)
        if size <= room:
            tested.add(group)
    return Split(
        train=tuple(s for s in samples if s.group not in tested),
        test=tuple(s for s in samples if s.group in tested),
    )


def draw_labelled(split: Split, n: int, seed: int) -> Draw:
    """Draw ``n`` labelled images: first such that every label occurs where possible, then at random.

    The draws of one seed are nested: the images of a smaller ``n`` are among those of a larger.

    Raises:
        InputError: When nothing would be left for the pool.
        AssertionError: When the parts are not apart; see `check_apart`.
    """
    if not 0 < n < len(split.train):
        raise InputError(
            "labelled", n, f"draw 1 to {len(split.train) - 1} of the images outside the test part"
        )
    order = [split.train[i] for i in np.random.default_rng([seed, 1]).permutation(len(split.train))]
    missing, chosen = _present(order), []
    while missing:
        best = max(order, key=lambda sample: len(sample.present & missing))
        chosen.append(best)
        order.remove(best)
        missing -= best.present
    chosen = (chosen + order)[:n]
    names = {sample.name for sample in chosen}
    labelled = tuple(s for s in split.train if s.name in names)
    pool = tuple(s for s in split.train if s.name not in names)
    draw = Draw(labelled=labelled, pool=pool)
    check_apart(split, draw)
    return draw


def check_apart(split: Split, draw: Draw) -> None:
    """Assert that no image, group or content of the test part is among those of a draw."""
    for what in ("name", "group", "digest"):
        tested = {getattr(sample, what) for sample in split.test}
        shared = tested & {getattr(sample, what) for sample in (*draw.labelled, *draw.pool)}
        assert not shared, f"{what} {sorted(shared)[:3]} of the test part is also outside it"
    assert not {s.name for s in draw.labelled} & {s.name for s in draw.pool}, (
        "labelled images are in the pool"
    )


def _present(samples: Sequence[Sample]) -> set[int]:
    return set().union(*(sample.present for sample in samples)) if samples else set()
