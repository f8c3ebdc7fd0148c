"""How well a promptable engine answers on accepted cases that it never saw, prompted as clinicians do."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import slice_image, tight_box
from sam_infer.intensity import Window
from sam_infer.overlap import dice
from sam_infer.prompts.simulated import jitter_box, next_click
from sam_infer.types import BoolArray, FloatArray, Prompts
from sam_infer.volumes import Image, read_image, read_labelmap
from trainers.data import Case, ReadImage, WindowFor
from trainers.evaluate import Score, mean, summarize
from trainers.slicestore import choose_slices

#: Slices of a case on which a label is judged, at most.
SLICES = 3
#: Greatest move of a box's side over the box.
CARELESS = 0.05
#: How an object is asked for, in the order of the figures.
KINDS = ("box", "click", "clicks3")


def prompted_score(
    encoder: SliceEncoder,
    cases: Sequence[Case],
    *,
    labels: Mapping[str, int],
    window_for: WindowFor,
    read: ReadImage = read_image,
) -> Score:
    """Dice by a box, by one click, and by three clicks, at the images' own resolution, as it is served.

    A box is the tight one with every side off by up to a twentieth of it, the same for every model; clicks
    are the innermost pixels of the largest error (`sam_infer.prompts.simulated.next_click`).

    Args:
        encoder: The engine behind its caches.
        cases: With accepted labels; none of them may have been trained on.
        labels: Label name to value.
        window_for: The window of an image for an (empty) request.
        read: How an image file is read.

    Returns:
        The mean over `KINDS`; the mean over labels of each kind is among its figures.
    """
    rows: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in KINDS}
    for case in cases:
        assert case.label is not None
        image = read(case.image)
        truth, window = read_labelmap(case.label, image), window_for(image, {})
        for name, value in labels.items():
            filled = np.array([bool((truth[:, :, k] == value).any()) for k in range(image.shape[2])])
            chosen = choose_slices(filled, limit=SLICES, empty_share=0.0) if filled.any() else []
            found = [
                prompted_dice(encoder, image, k, window, slice_image(truth, k) == value, name=case.case_id)
                for k in chosen
            ]
            for kind in KINDS:
                values = [one[kind] for one in found]
                rows[kind].setdefault(case.case_id, {})[name] = mean(values)
    scores = {kind: summarize(rows[kind], list(labels)) for kind in KINDS}
    together = {
        case: {name: mean([rows[kind][case][name] for kind in KINDS]) for name in labels}
        for case in rows["box"]
    }
    figures = {f"{kind}_dice": scores[kind].value for kind in KINDS}
    return replace(summarize(together, list(labels)), metric="prompted_dice", figures=figures)


def prompted_dice(
    encoder: SliceEncoder, image: Image, k: int, window: Window, truth: BoolArray, *, name: str
) -> dict[str, float]:
    """Dice of each of `KINDS` for one object.

    Args:
        encoder: The engine behind its caches.
        image: The image.
        k: Slice index.
        window: The window.
        truth: (H, W) bool, not empty.
        name: Seeds the box.
    """
    box = tight_box(truth)
    assert box is not None
    rng = np.random.default_rng(zlib.crc32(f"{name} {k}".encode()))
    drawn = jitter_box(box, CARELESS, rng, (truth.shape[0], truth.shape[1]))

    def answer(prompts: Prompts) -> BoolArray:
        return encoder.decode_history(image, k, window, prompts).mask()

    out = {"box": dice(answer(Prompts(box=drawn)), truth)}
    mask, clicks = np.zeros_like(truth), np.zeros((0, 3), np.float32)
    for count in range(1, 4):
        click = next_click(truth, mask)
        if click is not None:
            clicks = np.concatenate([clicks, np.array([click], np.float32)])
            mask = answer(_clicked(clicks))
        if count in (1, 3):
            out["click" if count == 1 else "clicks3"] = dice(mask, truth)
    return out


def _clicked(clicks: FloatArray) -> Prompts:
    return Prompts(points=clicks[:, :2], point_labels=clicks[:, 2].astype(np.int64))
