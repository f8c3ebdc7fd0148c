import pytest

from apps.samloop.labelinfo import index_of_value
from sam_infer.errors import InputError

LABELS = {"liver": 1, "spleen": 2, "aorta": 3}


def entries(*pairs):
    return [{"name": name, "idx": idx} for name, idx in pairs]


def test_without_info_values_are_the_projects_indices():
    assert index_of_value([0, 1, 3], None, LABELS) == {1: 1, 3: 3}


def test_slicer_numbers_exported_segments_by_position():
    """The clinician made only two segments, in another order."""
    assert index_of_value([1, 2], entries(("aorta", 1), ("liver", 2)), LABELS) == {1: 3, 2: 1}


def test_slicer_counts_a_background_segment_that_it_does_not_export():
    assert index_of_value([1, 2], entries(("liver", 2), ("aorta", 3)), LABELS) == {1: 1, 2: 3}
    assert index_of_value([2], entries(("liver", 2), ("aorta", 3)), LABELS) == {2: 3}


def test_slicer_skips_a_segment_in_the_middle():
    assert index_of_value([1, 2], entries(("liver", 1), ("aorta", 3)), LABELS) == {1: 1, 2: 3}
    assert index_of_value([1, 3], entries(("liver", 1), ("aorta", 3)), LABELS) == {1: 1, 3: 3}


@pytest.mark.parametrize(
    ("present", "info"),
    [
        # 3D Slicer's list with strokes after the liver and no spleen, or a client's own values?
        ([1, 3], entries(("liver", 1), ("spleen", 3), ("aorta", 4))),
        # 3D Slicer's list with the background first and no spleen, or the project's own indices?
        ([2], entries(("spleen", 2), ("aorta", 3))),
    ],
)
def test_a_value_that_may_be_either_of_two_organs_is_refused(present, info):
    with pytest.raises(InputError, match="in 3D Slicer move the segments background and scribbles"):
        index_of_value(present, info, LABELS)


def test_rest_clients_use_idx_as_the_value():
    assert index_of_value([3], entries(("aorta", 3)), LABELS) == {3: 3}
    assert index_of_value([5, 9], entries(("aorta", 9), ("liver", 5)), LABELS) == {5: 1, 9: 3}


def test_an_explicit_value_wins():
    info = [{"name": "liver", "idx": 2, "value": 2}, {"name": "aorta", "idx": 3, "value": 1}]
    assert index_of_value([1, 2], info, LABELS) == {1: 3, 2: 1}


def test_absent_segments_with_unknown_names_do_not_matter():
    assert index_of_value([1], entries(("liver", 1), ("Segment_2", 2)), LABELS) == {1: 1}


@pytest.mark.parametrize(
    ("present", "info", "message"),
    [
        ([4], None, "label = 4"),
        ([2], entries(("liver", 1)), "label = 2"),
        ([1], entries(("Segment_1", 1)), "rename the segment to one of 1 = liver"),
        ([1], "x", "label_info = 'x'"),
        ([1], [{"idx": 1}], "label_info"),
        ([1], [{"name": "liver", "idx": "1"}], "label_info"),
        ([1], ["liver"], "label_info"),
        ([7], [{"name": "liver", "value": 7}, {"name": "spleen", "idx": 2}], "all entries or with none"),
    ],
)
def test_what_cannot_be_mapped_is_refused(present, info, message):
    with pytest.raises(InputError, match=message):
        index_of_value(present, info, LABELS)
