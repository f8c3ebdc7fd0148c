import numpy as np
import pytest

from sam_infer.errors import InputError
from sam_infer.geometry import is_regular, parse_points, parse_roi, put_slice, slice_image, tight_box
from sam_infer.prompts.request import parse_slice
from trainers.options import number

SHAPE = (40, 30, 10)


def test_slice_image_has_x_as_i_and_y_as_j():
    volume = np.arange(4 * 3 * 2).reshape(4, 3, 2)
    image = slice_image(volume, 1)
    assert image.shape == (3, 4)
    assert image[2, 3] == volume[3, 2, 1]


def test_put_slice_is_the_inverse_of_slice_image():
    volume = np.zeros((4, 3, 2))
    image = np.arange(12).reshape(3, 4)
    put_slice(volume, 1, image)
    np.testing.assert_array_equal(slice_image(volume, 1), image)
    assert not volume[:, :, 0].any()


def test_roi_is_read_in_slicers_order_unsorted_and_clipped():
    region = parse_roi([35, 5.4, 20, 45, 9, 2], SHAPE)
    assert region.low == (5, 20, 2)
    assert region.high == (35, 29, 9)
    assert region.box == (5.0, 20.0, 35.0, 29.0)
    assert list(region.slices) == list(range(2, 10))


def test_roi_of_a_flat_image_may_leave_k_out():
    assert parse_roi([1, 2, 3, 4], (40, 30, 1)).high == (2, 4, 0)


@pytest.mark.parametrize(
    "roi",
    [[1, 2, 3], [1, 2, 3, 4], "abc", [1, 2, 3, 4, 5, float("nan")], [100, 120, 0, 5, 0, 5], [None] * 6, {}],
)
def test_bad_roi_names_the_argument_the_value_and_the_order(roi):
    with pytest.raises(InputError, match=r"^roi = .*i0, i1, j0, j1, k0, k1"):
        parse_roi(roi, SHAPE)


@pytest.mark.parametrize("points", [[[3, 4]], [[3, 4, 0]], [3, 4]])
def test_points_of_a_flat_image_are_column_and_row(points):
    np.testing.assert_array_equal(parse_points("foreground", points, (40, 30, 1)), [[3, 4, 0]])


@pytest.mark.parametrize(
    "points",
    [
        [[3, 4]],
        [[40, 0, 0]],
        [[0, 0, -1]],
        "x",
        [[1, 2, float("inf")]],
        [[1, 2, 3, 4]],
        [[1, [2], 3]],
        {"a": 1},
    ],
)
def test_bad_points_are_refused_with_their_name(points):
    with pytest.raises(InputError, match=r"^foreground = "):
        parse_points("foreground", points, SHAPE)


def test_point_outside_names_the_point_and_the_shape():
    with pytest.raises(InputError, match=r"background = \[40\.0, 2\.0, 3\.0\].*\(40, 30, 10\)"):
        parse_points("background", [[1, 2, 3], [40, 2, 3]], SHAPE)


def test_no_points_is_an_empty_array():
    assert parse_points("foreground", [], SHAPE).shape == (0, 3)
    assert parse_points("foreground", None, SHAPE).shape == (0, 3)


def test_tight_box_includes_the_outermost_pixels():
    mask = np.zeros((20, 30), bool)
    mask[4:9, 11:17] = True
    assert tight_box(mask) == (11.0, 4.0, 16.0, 8.0)
    assert tight_box(np.zeros((5, 5), bool)) is None


@pytest.mark.parametrize("value", [10**400, -(10**400), "1e400"])
@pytest.mark.parametrize(
    ("name", "parse"),
    [
        ("roi", lambda value: parse_roi([value, 2, 3, 4, 5, 6], SHAPE)),
        ("foreground", lambda value: parse_points("foreground", [[1, value, 3]], SHAPE)),
        ("slice", lambda value: parse_slice(value, SHAPE)),
        ("epochs", lambda value: number({"epochs": value}, "epochs", 5, low=1, high=100, whole=True)),
    ],
)
def test_a_number_that_no_float_holds_is_refused(name, parse, value):
    with pytest.raises(InputError, match=f"^{name} = ") as caught:
        parse(value)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("affine", "regular"),
    [
        (np.diag([0.5, 0.7, 3, 1]), True),
        (np.diag([1e-6, 1e-6, 1e-3, 1]), True),
        (np.diag([1.0, 0, 1, 1]), False),
        (np.diag([1.0, np.nan, 1, 1]), False),
        (np.diag([1.0, 1e30, 1, 1]), False),
        (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), False),
    ],
)
def test_regular_affines(affine, regular):
    assert is_regular(affine) == regular


def test_a_flood_of_points_is_refused():
    with pytest.raises(InputError, match=r"300 points.*at most 256"):
        parse_points("foreground", [[1, 1, 1]] * 300, (4, 4, 4))
