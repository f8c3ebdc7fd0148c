import pytest

from trainers.split import group_of, is_held_out

PINNED = ["case_0000", "case_0003", "case_0005"]
NAMES = [f"case_{i:04d}" for i in range(2000)]


def test_share_is_close_to_the_fraction():
    for fraction in (0.1, 0.25, 0.5):
        share = sum(is_held_out(n, fraction=fraction) for n in NAMES) / len(NAMES)
        assert abs(share - fraction) < 0.03


def test_extremes_hold_nothing_and_everything():
    assert not any(is_held_out(n, fraction=0.0) for n in NAMES)
    assert all(is_held_out(n, fraction=1.0) for n in NAMES)


def test_decision_is_pinned_so_that_no_release_moves_cases_between_the_parts():
    assert [n for n in NAMES[:12] if is_held_out(n, fraction=0.25)] == PINNED


def test_slices_of_one_patient_stay_together():
    group = r"^(patient_\d+)"
    for patient in range(60):
        slices = [f"patient_{patient}_{k}" for k in range(8)]
        assert len({is_held_out(s, fraction=0.3, group=group) for s in slices}) == 1
    alone = {is_held_out(f"patient_1_{k}", fraction=0.3) for k in range(30)}
    assert alone == {True, False}


def test_group_without_parentheses_is_the_whole_match_and_without_match_the_name():
    assert group_of("patient_7_3", group=r"patient_\d+") == "patient_7"
    assert group_of("patient_7_3", group=r"_(\d+)_") == "7"
    assert group_of("other", group=r"patient_\d+") == "other"


def test_bad_fraction_is_named():
    with pytest.raises(ValueError, match=r"fraction = 1\.5"):
        is_held_out("a", fraction=1.5)
