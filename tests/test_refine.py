"""Masks refined by an engine: what each pass is asked, and what becomes of the answers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.bundled import BundledEngine
from sam_infer.intensity import EIGHT_BIT
from sam_infer.overlap import dice
from sam_infer.prompts.masks import mask_prompts
from sam_infer.refine import (
    KEUTH,
    RefineLimits,
    Scheme,
    labelled,
    refine_slice,
    refine_volume,
)
from sam_infer.types import Candidates
from sam_infer.uncertainty import as_bytes, binary_entropy, mean_by_label
from sam_infer.volumes import Image
from tests.conftest import disc
from tests.fakes import ThresholdEngine

SIZE = (48, 64)
A, B = disc(SIZE, (16, 20), 9), disc(SIZE, (46, 28), 8)
GREY = np.where(A | B, 0.9, 0.1).astype(np.float32)
#: What a network might have said: too small, and shifted.
ROUGH = {4: disc(SIZE, (15, 19), 6), 7: disc(SIZE, (48, 28), 6)}


class Asked:
    """A decoder that remembers its calls."""

    def __init__(self, engine=None, grey=GREY):
        self.engine = engine or ThresholdEngine()
        self.embedding = self.engine.encode(grey)
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return self.engine.decode(self.embedding, prompts)


def volume(*, depth=6, holding=(1, 2, 4)):
    """An (I, J, K) image with both discs on some slices, and the rough label map of it."""
    array = np.full((SIZE[1], SIZE[0], depth), 25, np.uint8)
    rough = np.zeros(array.shape, np.uint8)
    for k in holding:
        array[:, :, k][(A | B).T] = 230
        for value, mask in ROUGH.items():
            rough[:, :, k][mask.T] = value
    return Image(array=array, affine=np.eye(4), key=("v", depth), flat=False), rough


def test_the_published_scheme_asks_box_then_mask_and_seeds_of_all_classes_in_one_call_each():
    decode = Asked()
    found = refine_slice({**ROUGH, 9: np.zeros(SIZE, bool)}, decode)
    prompts = mask_prompts(ROUGH)
    first, second = decode.calls
    assert len(decode.calls) == 2 and list(found) == [4, 7]
    for (value, prompt), one, two in zip(prompts.items(), first, second, strict=True):
        assert one.box == prompt.box and not len(one.points) and one.mask_logits is None
        assert two.box is None and two.point_labels.tolist() == [1, 0]
        assert two.points.tolist() == [list(prompt.positive), *prompt.negatives.tolist()]
        inside = np.zeros(SIZE, bool)
        x0, y0, x1, y1 = (int(v) for v in prompt.box)
        inside[y0 : y1 + 1, x0 : x1 + 1] = True
        assert np.array_equal(two.mask_logits > 0, (A | B) & inside), "the first pass's logits go along"
        assert found[value].prompts[0].box == prompt.box
    assert np.array_equal(found[4].mask, A) and np.array_equal(found[7].mask, B)
    assert found[4].iou == pytest.approx(0.9) and np.array_equal(found[4].logits > 0, found[4].mask)
    expected = 2 * (A & ROUGH[4]).sum() / (A.sum() + ROUGH[4].sum())
    assert found[4].agreement == pytest.approx(expected) and 0.5 < expected < 1


@pytest.mark.parametrize("first", ["box", "points", "positive"])
@pytest.mark.parametrize("second", ["none", "box", "points", "positive"])
def test_every_scheme_asks_what_it_says(first, second):
    decode = Asked()
    found = refine_slice(ROUGH, decode, Scheme(first=first, second=second))
    uses = [first] if second == "none" else [first, second]
    assert len(decode.calls) == len(uses) and set(found) == {4, 7}
    for n, (use, call) in enumerate(zip(uses, decode.calls, strict=True)):
        for prompt in call:
            assert (prompt.box is not None) == (use == "box")
            assert len(prompt.positive) == (use != "box") and len(prompt.negative) == (use == "points")
            assert (prompt.mask_logits is not None) == (n == 1)


def test_dilation_widens_the_box_and_nothing_else_is_measured_by_it():
    decode = Asked()
    plain = refine_slice(ROUGH, decode)
    wide = refine_slice(ROUGH, decode, Scheme(dilation=9))
    x0, y0, x1, y1 = plain[4].prompts[0].box
    assert wide[4].prompts[0].box == (x0 - 4, y0 - 4, x1 + 4, y1 + 4)
    assert wide[4].agreement == dice(wide[4].mask, ROUGH[4])


def test_a_mask_without_a_pixel_of_its_own_is_not_asked_about_and_stays():
    inner = disc(SIZE, (16, 20), 3)
    decode = Asked()
    found = refine_slice({4: A, 5: inner}, decode)
    assert list(found) == [4] and [len(call) for call in decode.calls] == [1, 1]
    out = labelled(found, {5: inner}, SIZE)
    assert np.array_equal(out == 5, inner) and np.array_equal(out == 4, A & ~inner)
    assert refine_slice({5: np.zeros(SIZE, bool)}, decode) == {} and len(decode.calls) == 2


def test_of_masks_that_overlap_the_highest_logit_wins():
    found = refine_slice(ROUGH, Asked())
    wide, narrow = (np.where(A | m, v, -5).astype(np.float32) for m, v in ((B, 1), (A, 3)))
    one = replace(found[4], mask=wide > 0, logits=wide)
    two = replace(found[7], mask=narrow > 0, logits=narrow)
    for pair in ({4: one, 7: two}, {7: two, 4: one}):
        out = labelled(pair, {}, SIZE)
        assert np.array_equal(out == 7, A) and np.array_equal(out == 4, B) and out.dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "value"), [("first", "none"), ("second", "mask"), ("seed", "middle"), ("dilation", -1)]
)
def test_a_wrong_scheme_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value!r}"):
        Scheme(**{name: value})


def test_a_volume_is_refined_on_the_slices_that_hold_something():
    image, rough = volume()
    engine = ThresholdEngine()
    found = refine_volume(image, rough, encoder=SliceEncoder(engine=engine), window=EIGHT_BIT)
    assert engine.encoded == 3 and len(engine.decoded) == 12
    for k in range(6):
        for value, truth in ((4, A), (7, B)):
            current = found.labelmap[:, :, k].T
            assert np.array_equal(current == value, truth & (k in (1, 2, 4)))
    assert found.uncertainty is None and set(found.labels) == {4, 7}
    label = found.labels[7]
    assert sorted(label.slices) == [1, 2, 4] and label.score == pytest.approx(0.9)
    assert label.slices[2].prompts[0].box == (42, 22, 54, 34) and not label.dropped and not label.kept
    assert label.slices[2].agreement == pytest.approx(dice(B, ROUGH[7]))


def test_other_labels_still_compete_when_only_one_is_asked_for():
    image, rough = volume()
    rough[:, :, 4][rough[:, :, 4] == 7] = 0
    engine = ThresholdEngine()
    found = refine_volume(image, rough, encoder=SliceEncoder(engine=engine), window=EIGHT_BIT, only={7})
    assert set(found.labels) == {7} == set(np.unique(found.labelmap)) - {0}
    assert engine.encoded == 2, "slices without the label are not looked at"
    negatives = found.labels[7].slices[1].prompts[0].negatives
    assert negatives.tolist() == [list(mask_prompts(ROUGH)[4].positive)]


def test_answers_that_are_not_believed_leave_their_class_empty_and_are_told():
    image, rough = volume()
    encoder = SliceEncoder(engine=ThresholdEngine())
    agreement = {value: dice(mask, ROUGH[value]) for value, mask in ((4, A), (7, B))}
    assert agreement[4] < agreement[7]
    limits = RefineLimits(agreement=(agreement[4] + agreement[7]) / 2)
    found = refine_volume(image, rough, encoder=encoder, window=EIGHT_BIT, limits=limits)
    assert set(np.unique(found.labelmap)) == {0, 7}
    assert found.labels[4].dropped == [1, 2, 4] and not found.labels[7].dropped
    none = refine_volume(image, rough, encoder=encoder, window=EIGHT_BIT, limits=RefineLimits(iou=0.95))
    assert not none.labelmap.any() and none.labels[7].dropped == [1, 2, 4]


class Ramp(ThresholdEngine):
    """Logits that fall with the distance from the object, one pixel at a time."""

    def _one(self, grey, prompt):
        mask = super()._one(grey, prompt).logits[0] > 0
        edge = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
        return Candidates(logits=edge[None].astype(np.float32), iou=np.array([0.8], np.float32))


def test_the_uncertainty_map_is_the_binary_entropy_of_the_most_doubtful_mask():
    image, rough = volume()
    found = refine_volume(
        image, rough, encoder=SliceEncoder(engine=Ramp()), window=EIGHT_BIT, uncertainty=True
    )
    assert found.uncertainty.dtype == np.uint8 and found.uncertainty.shape == image.shape
    assert not found.uncertainty[:, :, [0, 3, 5]].any()
    current = found.uncertainty[:, :, 2].T
    probability = []
    for mask in (A, B):
        logits = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
        probability.append(1 / (1 + np.exp(-logits)))
    p = np.array(probability)
    bits = (-(p * np.log2(p) + (1 - p) * np.log2(1 - p))).max(0)
    assert np.abs(current / 255 - bits).max() <= 0.5 / 255 + 1e-6
    assert current[20, 16] < 10 < 200 < current[20, 16 + 9]


def test_entropy_is_one_bit_in_doubt_and_none_in_certainty():
    values = binary_entropy(np.array([0.0, 50.0, -50.0, np.log(3)], np.float32))
    np.testing.assert_allclose(values, [1, 0, 0, 0.811278], atol=1e-5)
    assert as_bytes(np.array([0, 0.5, 1, 1.1], np.float32)).tolist() == [0, 128, 255, 255]
    labels = np.array([[[1, 1, 2, 0]]], np.uint8)
    doubt = np.array([[[0, 255, 51, 255]]], np.uint8)
    assert mean_by_label(doubt, labels, {"a": 1, "b": 2, "c": 3}) == {"a": 0.5, "b": 0.2}


def test_the_bundled_engine_makes_rough_masks_better():
    rng = np.random.default_rng(0)
    grey = np.clip(rng.normal(0.25, 0.05, SIZE) + 0.45 * (A | B), 0, 1).astype(np.float32)
    decode = Asked(BundledEngine(), grey)
    tight, wide = (refine_slice(ROUGH, decode, scheme) for scheme in (KEUTH, Scheme(dilation=4)))
    assert [len(call) for call in decode.calls] == [2, 2, 2, 2]
    for value, truth in ((4, A), (7, B)):
        before = dice(ROUGH[value], truth)
        assert before + 0.1 < dice(tight[value].mask, truth), "a box that is too small holds it back"
        assert dice(wide[value].mask, truth) > 0.95
        assert tight[value].iou < wide[value].iou <= 1


def test_parts_of_a_label_are_prompted_each_by_itself():
    image = np.zeros((40, 60), np.float32)
    image[5:15, 5:15] = image[5:15, 40:50] = 1.0
    pair = np.zeros((40, 60), bool)
    pair[7:13, 7:13] = pair[7:13, 42:48] = True
    engine = ThresholdEngine()
    embedding = engine.encode(image)

    def decode(prompts):
        return engine.decode(embedding, prompts)

    together = refine_slice({4: pair}, decode)[4]
    apart = refine_slice({4: pair}, decode, Scheme(keep="parts"))[4]
    assert [p.box for p in together.prompts] == [(7, 7, 47, 12)]
    assert [p.box for p in apart.prompts] == [(7, 7, 12, 12), (42, 7, 47, 12)]
    assert [p.negatives.tolist() for p in apart.prompts] == [
        [list(apart.prompts[1].positive)],
        [list(apart.prompts[0].positive)],
    ]
    assert np.array_equal(apart.mask, image > 0.5) or dice(apart.mask, pair) > 0.99
    assert apart.agreement == dice(apart.mask, pair) and apart.iou == pytest.approx(0.9)
    x, y = (int(v) for v in together.prompts[0].positive)
    assert not pair[y, x], "one centroid for both lies between them"
