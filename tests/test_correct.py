"""What of an engine's answer to a corrective click is taken over."""

import numpy as np
import pytest

from sam_infer.correct import correct_slice, correct_volume
from sam_infer.step import mask_step
from sam_infer.types import Candidates, Prompts


def logits(*boxes, strength=3.0):
    """(40, 40) logits: positive in boxes (x0, y0, x1, y1), ends excluded."""
    mask = np.zeros((40, 40), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return np.where(mask, strength, -strength).astype(np.float32)


OBJECT = (5, 5, 15, 15)


def test_a_larger_change_elsewhere_is_refused():
    before = logits(OBJECT)
    answer = logits((5, 5, 18, 15), (25, 25, 35, 35), strength=5.0)
    after = correct_slice(before, answer, point=(16, 10), label=1)
    np.testing.assert_array_equal(after > 0, logits((5, 5, 18, 15)) > 0)
    assert after[10, 10] == 5.0
    assert after[30, 30] == -3.0


def test_a_larger_removal_elsewhere_is_refused_too():
    before = logits(OBJECT, (25, 25, 35, 35))
    after = correct_slice(before, logits((5, 5, 18, 15)), point=(16, 10), label=1)
    np.testing.assert_array_equal(after > 0, logits((5, 5, 18, 15), (25, 25, 35, 35)) > 0)


def test_smaller_changes_elsewhere_are_taken_over():
    answer = logits((5, 5, 25, 15), (30, 30, 34, 34))
    after = correct_slice(logits(OBJECT), answer, point=(20, 10), label=1)
    np.testing.assert_array_equal(after, answer)


def test_a_background_click_removes_its_part_and_adds_nothing_larger():
    before = logits(OBJECT, (20, 5, 26, 11))
    after = correct_slice(before, logits(OBJECT, (25, 25, 35, 35)), point=(22, 8), label=0)
    np.testing.assert_array_equal(after > 0, logits(OBJECT) > 0)


@pytest.mark.parametrize("before", [logits(OBJECT), logits()], ids=["disobeyed", "nothing before"])
def test_an_answer_that_cannot_be_checked_stands(before):
    answer = logits((25, 25, 35, 35))
    point = (30, 5) if (before > 0).any() else (30, 30)
    np.testing.assert_array_equal(correct_slice(before, answer, point=point, label=1), answer)


def agree(_, prompts):
    """An engine that agrees to whatever it is shown."""
    return [Candidates(logits=p.mask_logits[None], iou=np.array([0.9], np.float32)) for p in prompts]


def test_a_change_is_carried_as_deep_as_it_is_wide():
    """Over an engine that agrees to whatever it is shown, nothing else would end it."""
    existing = np.zeros((40, 40, 30), bool)
    existing[5:15, 5:15] = True
    answer = mask_step(15, logits(OBJECT, (15, 5, 25, 15)) > 0, iou=0.9)

    for thickness, depth in ((1.0, 5), (2.5, 2)):
        found = correct_volume(
            existing, {15: answer}, decode=agree, clicks=lambda _: Prompts(), thickness=thickness
        )
        after = found.paint(existing.astype(np.uint8)) > 0
        changed = np.flatnonzero((after ^ existing).any(axis=(0, 1)))
        assert changed.tolist() == list(range(15 - depth, 15 + depth + 1))
        assert set(found.stops.values()) == {"deep enough"}


def test_a_change_that_the_neighbours_have_already_is_carried_nowhere():
    larger = logits(OBJECT, (15, 5, 25, 15)) > 0
    existing = np.repeat(larger.T[:, :, None], 9, axis=2)
    existing[15:, :, 4] = False
    found = correct_volume(
        existing, {4: mask_step(4, larger, iou=0.9)}, decode=agree, clicks=lambda _: Prompts()
    )
    assert found.stops == {3: "unchanged", 5: "unchanged"}
    assert found.walked == [4]


def test_a_correction_stays_within_its_bounds():
    existing = np.zeros((40, 40, 30), bool)
    existing[5:15, 5:15] = True
    answer = mask_step(15, logits(OBJECT, (15, 5, 25, 15)) > 0, iou=0.9)
    found = correct_volume(
        existing, {15: answer}, decode=agree, clicks=lambda _: Prompts(), bounds=range(13, 19)
    )
    assert sorted(found.steps) == [13, 14, 15, 16, 17, 18]
    assert found.stops == {12: "roi", 19: "roi"}
