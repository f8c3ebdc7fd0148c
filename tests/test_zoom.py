"""Zoom: where crops lie, that they are seen at a higher resolution, and that nothing moves by them."""

import numpy as np
import pytest

from sam_infer.embeddings import SliceEncoder
from sam_infer.engines.base import Encoding
from sam_infer.intensity import Window
from sam_infer.types import Candidates, Prompts
from sam_infer.volumes import Image
from sam_infer.zoom import OUTSIDE, choose_crop, crop_prompts, holds, leaves, paste
from tests.conftest import disc
from tests.fakes import CoarseEngine

SIZE = (200, 240)  # rows, columns
UNIT = Window(level=0.5, width=1.0)


def on(centre, radius, size=SIZE):
    """An image that is 0.9 in a disc and 0.1 elsewhere, and the disc."""
    truth = disc(size, centre, radius)
    array = np.where(truth, 0.9, 0.1).astype(np.float32).T[:, :, None]
    return Image(array=array, affine=np.eye(4), key=("disc", centre, radius), flat=False), truth


def seen(side, **more):
    return Encoding(side=side, cheap=True, device="cpu", **more)


def box_of(centre, radius):
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def clicks(*positive, negative=(), **rest):
    return Prompts(
        points=np.array([*positive, *negative], np.float32).reshape(-1, 2),
        point_labels=np.array([1] * len(positive) + [0] * len(negative)),
        **rest,
    )


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# Where crops lie


@pytest.mark.parametrize("centre", [(120, 100), (3, 2), (236, 197), (12, 100)])
@pytest.mark.parametrize("radius", [2, 9, 25])
def test_a_crop_lies_in_the_slice_and_holds_the_box_with_its_surroundings(centre, radius):
    box = tuple(
        float(np.clip(v, 0, n - 1)) for v, n in zip(box_of(centre, radius), (240, 200, 240, 200), strict=True)
    )
    x0, y0, x1, y1 = choose_crop([Prompts(box=box)], SIZE, seen(64))
    assert x0 >= 0
    assert y0 >= 0
    assert x1 < SIZE[1]
    assert y1 < SIZE[0]
    longest = max(box[2] - box[0], box[3] - box[1]) + 1
    assert 3 * longest <= x1 - x0 + 1 <= max(3 * 1.2 * longest, 10) or y1 - y0 + 1 == SIZE[0]
    for low, high, first, last, end in ((x0, x1, box[0], box[2], 239), (y0, y1, box[1], box[3], 199)):
        assert first - low >= 0.5 * longest or low == 0
        assert high - last >= 0.5 * longest or high == end


def test_a_crop_is_worth_its_encoding():
    """Where the slice is not larger than what the engine sees, a third more; where it is, any gain."""
    box = Prompts(box=box_of((120, 100), 31))  # 63 pixels: a crop of 215, as steps go
    assert choose_crop([box], SIZE, seen(256)) is None
    assert choose_crop([box], SIZE, seen(128)) is not None
    assert choose_crop([Prompts(box=box_of((120, 100), 40))], SIZE, seen(64)) is None


def test_a_crop_is_not_enlarged_without_end():
    x0, _, x1, _ = choose_crop([Prompts(box=(50.0, 50.0, 50.0, 50.0))], SIZE, seen(256))
    assert x1 - x0 + 1 == 256 / 8


def test_an_engine_may_want_less_around_the_object():
    box = Prompts(box=box_of((120, 100), 9))
    wide, narrow = (choose_crop([box], SIZE, seen(64, margin=margin)) for margin in (3.0, 1.5))
    assert narrow[2] - narrow[0] + 1 == pytest.approx((wide[2] - wide[0] + 1) / 2, abs=1)


def test_a_slender_box_and_a_slice_that_is_not_square():
    assert choose_crop([Prompts(box=(10.0, 20.0, 40.0, 22.0))], (30, 400), seen(64))[1::2] == (0, 29)


def test_clicks_alone_tell_no_size():
    assert choose_crop([clicks((50, 60))], SIZE, seen(64)) is None


def test_clicks_beside_the_box_keep_the_crop_and_one_far_away_moves_it():
    box = box_of((60, 60), 8)
    crop = choose_crop([Prompts(box=box)], SIZE, seen(64))
    assert choose_crop([clicks((72, 60), negative=[(60, 75), (200, 10)], box=box)], SIZE, seen(64)) == crop
    moved = choose_crop([clicks((100, 60), box=box)], SIZE, seen(64))
    assert moved != crop
    assert holds(moved, np.array([[60, 60], [100, 60]], np.float32))


def test_a_mask_that_changes_a_little_keeps_the_crop():
    crops = {
        choose_crop([Prompts(mask_logits=np.where(disc(SIZE, (90, 80), r), 3.0, -3.0))], SIZE, seen(64))
        for r in (9.2, 9.6, 10.4)
    }
    assert len(crops) == 1


# Into a crop and back


def test_prompts_move_with_the_crop_and_background_beyond_is_left_out():
    crop = (40, 30, 79, 69)
    mask = np.arange(SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    sent = clicks((45, 33), negative=[(50, 69), (39, 50)], box=(42.0, 31.0, 60.0, 50.0), mask_logits=mask)
    moved = crop_prompts(sent, crop)
    np.testing.assert_array_equal(moved.points, [[5, 3], [10, 39]])
    np.testing.assert_array_equal(moved.point_labels, [1, 0])
    assert moved.box == (2.0, 1.0, 20.0, 20.0)
    np.testing.assert_array_equal(moved.mask_logits, mask[30:70, 40:80])


def test_pasted_logits_are_where_they_were_and_background_beyond():
    inside = np.arange(40 * 40, dtype=np.float32).reshape(1, 40, 40)
    pasted = paste(Candidates(logits=inside, iou=np.ones(1, np.float32)), (40, 30, 79, 69), SIZE)
    np.testing.assert_array_equal(pasted.logits[:, 30:70, 40:80], inside)
    assert (np.delete(pasted.logits, np.s_[30:70], 1) == OUTSIDE).all()
    assert pasted.crop == (40, 30, 79, 69)


@pytest.mark.parametrize(
    ("crop", "out"), [((40, 30, 79, 69), True), ((0, 0, 79, 69), False), ((41, 30, 79, 69), False)]
)
def test_a_mask_leaves_a_crop_where_the_slice_goes_on(crop, out):
    mask = np.zeros(SIZE, bool)
    mask[50, 40 if crop[0] else 0] = True
    assert leaves(mask, crop) == out


@pytest.mark.parametrize("x", [160, 239])
@pytest.mark.parametrize("y", [120, 199])
def test_a_corner_of_a_crop_is_where_the_slice_goes_on_unless_it_is_the_slices_own(x, y):
    mask = np.zeros(SIZE, bool)
    mask[y, x] = True
    assert leaves(mask, (40, 30, x, y)) == ((x, y) != (239, 199))


# Through the encoder


@pytest.mark.parametrize("centre", [(120, 100), (31.3, 140.6), (7, 6), (235, 193)])
def test_a_small_object_in_a_box_is_seen_at_a_higher_resolution_and_in_its_place(centre):
    image, truth = on(centre, 5)
    box = tuple(float(np.clip(v, 0, n)) for v, n in zip(box_of(centre, 7), (239, 199, 239, 199), strict=True))
    masks = {}
    for zoom in (False, True):
        encoder = SliceEncoder(engine=CoarseEngine())
        found = encoder.decode_history(image, 0, UNIT, Prompts(box=box), zoom=zoom)
        assert (found.crop is not None) == zoom
        masks[zoom] = found.mask()
    assert dice(masks[True], truth) > 0.98
    assert dice(masks[True], truth) > dice(masks[False], truth) + 0.05
    shift = np.argwhere(masks[True]).mean(0) - np.argwhere(truth).mean(0)
    assert np.abs(shift).max() < 0.25


def test_auto_zooms_boxes_always_and_clicks_where_encoding_is_cheap():
    image, truth = on((60, 60), 6)
    for cheap in (False, True):
        encoder = SliceEncoder(engine=CoarseEngine(cheap=cheap))
        assert encoder.decode_history(image, 0, UNIT, Prompts(box=box_of((60, 60), 8))).crop is not None
        clicked = encoder.decode_history(image, 0, UNIT, clicks((60, 60)))
        assert (clicked.crop is not None) == cheap
    assert dice(clicked.mask(), truth) > 0.98
    asked = SliceEncoder(engine=CoarseEngine())
    assert asked.decode_history(image, 0, UNIT, clicks((60, 60)), zoom=True).crop is not None


def test_a_large_object_is_decoded_once_and_whole():
    image, _ = on((120, 100), 60)
    engine = CoarseEngine(cheap=True)
    found = SliceEncoder(engine=engine).decode_history(image, 0, UNIT, clicks((120, 100)), zoom=True)
    assert found.crop is None
    assert len(engine.decoded) == engine.encoded == 1


@pytest.mark.parametrize("first", [{"box": box_of((60, 60), 8)}, {}])
def test_corrective_clicks_reuse_the_crop_until_one_lies_beyond_it(first):
    image, _ = on((60, 60), 6)
    engine = CoarseEngine(cheap=True)
    encoder = SliceEncoder(engine=engine)
    crop = encoder.decode_history(image, 0, UNIT, clicks((60, 60), **first)).crop
    encoded = engine.encoded
    for sent in (
        clicks((60, 60), negative=[(60, 68)], **first),
        clicks((60, 60), (62, 60), negative=[(60, 68)], **first),
    ):
        assert encoder.prepare(image, 0, UNIT, sent) or not first
        assert encoder.decode_history(image, 0, UNIT, sent).crop == crop
    assert engine.encoded == encoded
    far = encoder.decode_history(image, 0, UNIT, clicks((60, 60), (62, 60), (100, 60), **first))
    assert far.crop != crop
    assert engine.encoded > encoded


def test_an_object_that_does_not_end_in_its_crop_is_decoded_whole():
    """The box holds a corner of it only; the mask sent along says nothing more."""
    image, truth = on((120, 100), 60)
    sent = Prompts(mask_logits=np.where(disc(SIZE, (120, 100), 5), 3.0, -3.0).astype(np.float32))
    engine = CoarseEngine()
    found = SliceEncoder(engine=engine).decode_history(image, 0, UNIT, sent, zoom=True)
    assert found.crop is None
    assert engine.encoded == 2
    assert dice(found.mask(), truth) > 0.98


def test_prompts_decoded_together_share_one_crop():
    image, truth = on((60, 60), 6)
    engine = CoarseEngine()
    both = [Prompts(box=box_of((60, 60), 8)), Prompts(mask_logits=np.where(truth, 3.0, -3.0))]
    found = SliceEncoder(engine=engine).decode(image, 0, UNIT, both, zoom=True)
    assert engine.encoded == 1
    assert found[0].crop == found[1].crop is not None


def test_an_engine_that_sees_every_pixel_is_not_zoomed():
    from tests.fakes import ThresholdEngine

    image, _ = on((60, 60), 6)
    engine = ThresholdEngine()
    found = SliceEncoder(engine=engine).decode_history(
        image, 0, UNIT, Prompts(box=box_of((60, 60), 8)), zoom=True
    )
    assert found.crop is None
    assert engine.encoded == 1
