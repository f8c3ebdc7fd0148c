import numpy as np
import pytest

from sam_infer.errors import InputError
from sam_infer.intensity import EIGHT_BIT, Window, choose_window, percentile_window
from sam_infer.prompts.request import parse_window

CT = Window(level=40, width=400)


def test_window_maps_its_ends_to_0_and_1_and_clips():
    image = np.array([-1000, -160, 40, 240, 3000], np.int16)
    np.testing.assert_allclose(CT.apply(image), [0, 0, 0.5, 1, 1], atol=1e-6)


def test_ct_is_known_by_its_air_and_takes_the_projects_window():
    hu = np.array([-1000, 0, 100, 2000], np.int16)
    assert choose_window(hu, ct=CT) == CT


def test_mr_takes_percentiles_not_the_ct_window():
    rng = np.random.default_rng(0)
    mr = rng.uniform(0, 1000, 100_000).astype(np.float32)
    mr[:10] = 50_000
    window = choose_window(mr, ct=CT)
    assert window.level == pytest.approx(500, abs=10)
    assert window.width == pytest.approx(990, abs=20)


def test_a_requests_window_wins():
    asked = Window(level=1, width=2)
    assert choose_window(np.array([-1000], np.int16), requested=asked, ct=CT) == asked


def test_eight_bit_pictures_are_taken_as_they_are():
    assert choose_window(np.array([3, 250], np.uint8), ct=CT, other=CT) == EIGHT_BIT


def test_constant_image_gets_a_window():
    assert percentile_window(np.full((4, 4), 7.0)).width > 0


@pytest.mark.parametrize("width", [0, -5, float("nan"), float("inf")])
def test_impossible_width_is_refused(width):
    with pytest.raises(InputError, match="window_width"):
        Window(level=0, width=width)


@pytest.mark.parametrize(
    ("level", "width", "name"),
    [
        (1e308, 400, "window_level"),
        (-1e31, 400, "window_level"),
        (10**400, 400, "window_level"),
        ("nan", 400, "window_level"),
        (40, 1e308, "window_width"),
        (40, 1e31, "window_width"),
        (40, 1e-60, "window_width"),
        (40, 1e-7, "window_width"),
        (40, 0, "window_width"),
    ],
)
def test_a_window_that_float32_cannot_hold_is_refused(level, width, name):
    with pytest.raises(InputError, match=f"^{name} = ") as caught:
        parse_window({"window_level": level, "window_width": width})
    assert caught.value.status == 400


@pytest.mark.parametrize("window", [(1e30, 1e-6), (-1e30, 1e30), (0, 1e-6), (0, 1e30)])
def test_the_widest_and_narrowest_windows_give_numbers(window):
    asked = parse_window(dict(zip(("window_level", "window_width"), window, strict=True)))
    image = np.array([-3e38, -1000, 0, 1e-7, 1000, 3e38], np.float32)
    with np.errstate(over="ignore"):
        out = asked.apply(image)
    assert ((out >= 0) & (out <= 1)).all()


@pytest.mark.parametrize("values", [[0, 1e-9], [-3e38, 3e38], [0, 1e-44], [3e38, 3e38]])
def test_percentiles_of_any_image_are_a_window(values):
    image = np.array(values * 50, np.float32)
    with np.errstate(over="ignore"):
        out = percentile_window(image).apply(image)
    assert ((out >= 0) & (out <= 1)).all()
