"""Candidate masks: where they come from, who rates them, and how that somebody errs."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from sam_infer.candidates import (
    MAX_CANDIDATES,
    CandidateSet,
    by_dropout,
    by_masks,
    by_thresholds,
    masks_of_bits,
    overlaps,
    ranked_by_mask,
    ranking_of,
    swap_adjacent,
    swap_levels,
    virtual_ratings,
)
from sam_infer.candidatesources import make_candidates, stochastic_logits
from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.types import Candidates, Prompts
from sam_infer.volumes import read_image
from tests.conftest import disc, save_png
from tests.fakes import ThresholdEngine


def strips(*widths, of=20):
    """(N, 1, of) bool: masks of the first so many pixels of a row."""
    return np.arange(of)[None, None] < np.array(widths)[:, None, None]


def test_thresholds_cut_a_probability_map():
    probability = np.array([[0.2, 0.3, 0.35, 0.45], [0.55, 0.6, 0.65, 1.0]], np.float32)
    made = by_thresholds(probability)
    assert made.areas == [6, 5, 4, 2], "a pixel at a threshold is not above it"
    assert made.thresholds == (0.3, 0.4, 0.5, 0.6)
    assert (made.masks[1:] <= made.masks[:-1]).all(), "stricter lies in looser"
    assert made.predicted_iou == ()


def test_masks_of_an_engine_in_its_order_and_the_best_of_many():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(10, 3, 4)).astype(np.float32)
    iou = np.array([0.5, 0.1, 0.9, 0.3, 0.8, 0.7, 0.2, 0.6, 0.4, 0.95], np.float32)
    made = by_masks(Candidates(logits=logits, iou=iou))
    kept = [0, 2, 3, 4, 5, 7, 8, 9]
    assert np.array_equal(made.masks, logits[kept] > 0)
    assert made.predicted_iou == pytest.approx(iou[kept])
    with pytest.raises(ValueError, match=r"2\.\.8"):
        by_masks(Candidates(logits=logits[:1], iou=iou[:1]))


def test_equal_candidates_stay_and_are_counted():
    made = by_thresholds(np.array([[0.1, 0.9]], np.float32))
    assert made.areas == [1, 1, 1, 1]
    assert made.distinct == 1
    assert by_dropout(np.array([[[1, -1]], [[-1, 1]], [[1, -1]]], np.float32)).distinct == 2


@pytest.mark.parametrize("count", range(2, MAX_CANDIDATES + 1))
def test_bits_hold_every_candidate(count):
    masks = np.random.default_rng(count).random((count, 5, 7)) > 0.5
    bits = CandidateSet(masks=masks, source="masks").bits
    assert bits.dtype == np.uint8
    assert bits[2, 3] == sum(2**n for n in range(count) if masks[n, 2, 3])
    assert np.array_equal(masks_of_bits(bits, count), masks)


def test_bits_of_no_candidate_are_refused():
    with pytest.raises(ValueError, match="more than 2"):
        masks_of_bits(np.array([[4]], np.uint8), 2)
    assert masks_of_bits(np.array([[255]], np.uint8), 8).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"masks": np.zeros((1, 4, 4), bool)},
        {"masks": np.zeros((9, 4, 4), bool)},
        {"masks": np.zeros((4, 4), bool)},
        {"source": "guess"},
        {"thresholds": (0.5,)},
    ],
)
def test_a_set_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        CandidateSet(**{"masks": np.zeros((3, 4, 4), bool), "source": "masks", **wrong})


def test_overlaps_are_the_jaccard_index():
    rng = np.random.default_rng(1)
    masks, truth = rng.random((5, 6, 7)) > 0.4, rng.random((6, 7)) > 0.6
    expected = [jaccard_score(truth.ravel(), mask.ravel()) for mask in masks]
    assert overlaps(masks, truth) == pytest.approx(expected)
    nothing = np.zeros((1, 20), bool)
    assert overlaps(strips(0, 3), nothing).tolist() == [1, 0], "nothing where there is nothing is right"


def test_the_virtual_annotator_rates_by_iou():
    truth = strips(20)[0]
    made = virtual_ratings(strips(0, 7, 8, 10, 11, 13, 14, 15, 20), truth)
    #        IoU:                 0  .35 .40 .50 .55 .65 .70 .75 1
    assert made.tolist() == [1, 1, 2, 2, 3, 3, 3, 4, 4]
    assert virtual_ratings(strips(9, 11), truth, levels=(0.5,)).tolist() == [1, 2]


def test_tied_candidates_keep_their_order():
    assert ranking_of([0.2, 0.9, 0.2, 0.9, 0.5]) == (1, 3, 4, 0, 2)
    assert ranked_by_mask(strips(4, 10, 8, 10), strips(9)[0]) == (1, 3, 2, 0)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_noise_swaps_neighbours_in_a_share_of_the_rankings(share):
    rng = np.random.default_rng(2)
    rankings = rng.permuted(np.tile(np.arange(4), (200, 1)), axis=1)
    before = rankings.copy()
    noisy = swap_adjacent(rankings, share, np.random.default_rng(3))
    assert np.array_equal(rankings, before)
    changed = (noisy != rankings).any(1)
    assert changed.sum() == 200 * share
    for old, new in zip(rankings[changed], noisy[changed], strict=True):
        (first, second) = np.flatnonzero(old != new)
        assert second == first + 1
        assert (new[first], new[second]) == (old[second], old[first])
    again = swap_adjacent(rankings, share, np.random.default_rng(3))
    assert np.array_equal(noisy, again)
    if share == 1:
        places = {int(np.flatnonzero(old != new)[0]) for old, new in zip(rankings, noisy, strict=True)}
        assert places == {0, 1, 2}, "every pair of neighbours is drawn"


def test_noise_swaps_neighbouring_levels_of_ratings():
    ratings = np.tile([1, 4, 4, 3], (100, 1))
    noisy = swap_levels(ratings, 1.0, np.random.default_rng(0))
    assert {tuple(row) for row in noisy.tolist()} == {(3, 4, 4, 1), (1, 3, 3, 4)}
    assert (swap_levels(ratings, 0.25, np.random.default_rng(0)) != ratings).any(1).sum() == 25
    equal = np.full((10, 4), 2)
    assert np.array_equal(swap_levels(equal, 1.0, np.random.default_rng(0)), equal), "no other level"


# From an engine


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A soft disc as an image, and a point and a box on it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :128]
    soft = 1 / (1 + np.exp((np.hypot(x - 60, y - 44) - 20) / 4))
    grey = np.clip(60 + 120 * soft + rng.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)
    image = read_image(save_png(tmp_path_factory.mktemp("scene") / "a.png", grey))
    point = Prompts(points=np.array([[60, 44]], np.float32), point_labels=np.array([1]))
    return image, point, Prompts(box=(40, 24, 80, 64)), disc((96, 128), (60, 44), 20)


@pytest.fixture(scope="module")
def tiny():
    return SliceEncoder(engine=create_engine("sam_tiny"))


WINDOW = Window(level=128, width=255)


def test_candidates_of_a_served_model(scene, tiny, one_thread):
    image, point, box, truth = scene
    cut = make_candidates(tiny, image, 0, WINDOW, box, "thresholds")
    found = tiny.decode(image, 0, WINDOW, [box], zoom=False)[0]
    assert np.array_equal(cut.masks[2], found.mask()), "p > 0.5 is what a click shows"
    assert cut.areas == sorted(cut.areas, reverse=True)
    assert overlaps(cut.masks, truth).min() > 0.6
    three = make_candidates(tiny, image, 0, WINDOW, point, "masks")
    assert three.masks.shape == (3, 96, 128)
    assert len(three.predicted_iou) == 3
    with pytest.raises(InputError, match="one foreground point alone") as error:
        make_candidates(tiny, image, 0, WINDOW, box, "masks")
    assert error.value.status == 422


def test_dropout_gives_candidates_that_differ_and_come_again(scene, tiny, one_thread):
    image, _, box, truth = scene
    made = make_candidates(tiny, image, 0, WINDOW, box, "dropout")
    assert made.distinct == 4
    assert overlaps(made.masks, truth).max() > 0.6
    again = make_candidates(tiny, image, 0, WINDOW, box, "dropout")
    assert np.array_equal(made.masks, again.masks)
    other = stochastic_logits(tiny, image, 0, WINDOW, box, seed=1)
    assert not np.array_equal(other > 0, made.masks)
    whole = tiny.decode(image, 0, WINDOW, [box], zoom=False)[0]
    kept = stochastic_logits(tiny, image, 0, WINDOW, box, passes=2, dropped=0.0)
    assert np.array_equal(kept, np.stack([whole.logits[whole.best]] * 2)), "nothing drops out"


def test_no_dropout_where_there_are_no_features(scene):
    image, _, box, _ = scene
    with pytest.raises(InputError, match="keeps no features") as error:
        make_candidates(SliceEncoder(engine=ThresholdEngine()), image, 0, WINDOW, box, "dropout")
    assert error.value.status == 422
