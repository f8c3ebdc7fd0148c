"""What a reply carries: the whole label map or the part that matters, and nothing copied for it."""

import gzip
import io
import re

import nibabel as nib
import nrrd
import numpy as np
import pytest

from sam_infer.errors import InputError
from sam_infer.geometry import Region, filled_region
from sam_infer.tasks.reply import make_reply
from sam_infer.volumes import Image, empty_labelmap, labelmap_parts, read_image
from tests.conftest import ball

SHAPE = (40, 36, 30)
AFFINE = np.array([[0.0, -2, 0, 7], [1.5, 0, 0, -3], [0, 0, 4, 11], [0, 0, 0, 1]])
IMAGE = Image(array=np.zeros(SHAPE, np.int16), affine=AFFINE, key=(), flat=False)
BALL = ball(SHAPE, (25, 12, 9), 6)


def labelmap(mask=BALL):
    array = empty_labelmap(SHAPE)
    array[mask] = 1
    return array


def read(file, tmp_path):
    (tmp_path / f"reply{file.kind}").write_bytes(b"".join(file.parts))
    return read_image(tmp_path / f"reply{file.kind}")


@pytest.mark.parametrize("kind", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("slices", [range(3, 16), range(0, 16), range(3, 30), None])
def test_what_is_left_out_is_read_as_zeros(tmp_path, kind, compress, slices):
    """Byte for byte what the same label map gives when all of it is looked at."""
    parts = labelmap_parts(labelmap(), AFFINE, kind, compress=compress, slices=slices)
    whole = labelmap_parts(labelmap(), AFFINE, kind, compress=compress)
    unpacked = [gzip.decompress(b"".join(p)) if kind == ".nii.gz" else b"".join(p) for p in (parts, whole)]
    if kind != ".nrrd" or not compress:
        assert unpacked[0] == unpacked[1]
    (tmp_path / f"r{kind}").write_bytes(b"".join(parts))
    found = read_image(tmp_path / f"r{kind}")
    np.testing.assert_array_equal(found.array, labelmap())
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("kind", [".nii.gz", ".nii"])
def test_a_picture_wider_than_nifti_holds_is_refused_with_the_remedy(kind):
    wide = empty_labelmap((2**15, 2, 1))
    with pytest.raises(InputError, match=r"result_extension.*32767.*ask for .nrrd"):
        labelmap_parts(wide, AFFINE, kind)
    assert labelmap_parts(wide[1:], AFFINE, kind)
    assert labelmap_parts(wide, AFFINE, ".nrrd")


def test_an_empty_label_map_is_sent_whole(tmp_path):
    file, facts = make_reply(empty_labelmap(SHAPE), IMAGE, {"result_extension": ".nrrd"}, slices=[4])
    assert facts == {"empty": True}
    assert read(file, tmp_path).shape == SHAPE
    assert not read(file, tmp_path).array.any()


def test_nifti_header_is_nibabels_own():
    parts = labelmap_parts(labelmap(), AFFINE, ".nii")
    image = nib.Nifti1Image(labelmap(), AFFINE)
    image.header.set_xyzt_units("mm")
    assert b"".join(parts) == image.to_bytes()


@pytest.mark.parametrize("kind", [".nrrd", ".nii.gz"])
def test_the_region_lies_where_the_mask_lies(tmp_path, kind):
    file, facts = make_reply(labelmap(), IMAGE, {"result_extension": kind, "result_region": True})
    assert facts["region"] == {"low": [19, 6, 3], "high": [31, 18, 15]}
    part = read(file, tmp_path)
    assert part.shape == (13, 13, 13)
    np.testing.assert_array_equal(part.array, labelmap()[19:32, 6:19, 3:16])
    np.testing.assert_allclose(part.affine @ [0, 0, 0, 1], AFFINE @ [19, 6, 3, 1], atol=1e-5)
    np.testing.assert_allclose(part.affine[:3, :3], AFFINE[:3, :3], atol=1e-5)


def test_with_a_mask_sent_along_only_what_changed_is_told(tmp_path):
    bite = ball(SHAPE, (30, 12, 9), 2.5) & BALL
    file, facts = make_reply(
        labelmap(BALL & ~bite), IMAGE, {"result_region": "True", "result_extension": "nrrd"}, existing=BALL
    )
    region = Region(low=tuple(facts["region"]["low"]), high=tuple(facts["region"]["high"]))
    assert region == filled_region(bite, range(SHAPE[2]))
    restored = BALL.copy()
    region.cut(restored)[...] = read(file, tmp_path).array
    np.testing.assert_array_equal(restored, BALL & ~bite)


@pytest.mark.parametrize(
    ("array", "existing", "empty"),
    [
        (empty_labelmap(SHAPE), None, True),
        (labelmap(), BALL, False),
        (empty_labelmap(SHAPE), ~BALL & BALL, True),
    ],
)
def test_no_change_is_no_file(array, existing, empty):
    assert make_reply(array, IMAGE, {"result_region": True}, existing=existing) == (
        None,
        {"empty": empty, "region": None},
    )


def test_only_the_slices_named_are_compared():
    """A 2D answer holds one slice; the rest of the mask sent along is not thereby removed."""
    _, facts = make_reply(
        labelmap(BALL & (np.arange(30) == 9)),
        IMAGE,
        {"result_region": True},
        slices=[9],
        existing=BALL & (np.arange(30) != 9),
    )
    assert facts["region"]["low"][2] == facts["region"]["high"][2] == 9


@pytest.mark.parametrize("name", ["result_region", "result_compress"])
@pytest.mark.parametrize("value", [7, "no", [], 0.5])
def test_a_wrong_flag_is_named(name, value):
    with pytest.raises(InputError, match=rf"{name} = {re.escape(repr(value))}: send true or false"):
        make_reply(labelmap(), IMAGE, {name: value})


@pytest.mark.parametrize(
    ("value", "encoding"),
    [(False, "raw"), ("False", "raw"), (0, "raw"), (True, "gzip"), (None, "gzip"), ("", "gzip")],
)
def test_a_flag_may_be_text(value, encoding):
    file, _ = make_reply(labelmap(), IMAGE, {"result_extension": ".nrrd", "result_compress": value})
    assert f"encoding: {encoding}\n".encode() in bytes(file.parts[0])


def test_a_file_on_disk_holds_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file, _ = make_reply(labelmap(), IMAGE, {"result_extension": ".nrrd"})
    np.testing.assert_array_equal(nrrd.read(file.write())[0], labelmap())
    assert io.BytesIO(b"".join(file.parts)).getbuffer().nbytes == next(tmp_path.iterdir()).stat().st_size


@pytest.mark.parametrize("kind", [".nrrd", ".nii.gz"])
def test_an_uncertainty_map_lies_on_its_label_map_whole_and_cut(tmp_path, kind):
    doubt = np.arange(np.prod(SHAPE), dtype=np.uint32).reshape(SHAPE).astype(np.uint8)
    asked = {"result_extension": kind, "output_uncertainty": True}
    file, facts = make_reply(labelmap(), IMAGE, asked, uncertainty=doubt)
    whole = read(file.uncertainty, tmp_path)
    np.testing.assert_array_equal(whole.array, doubt)
    np.testing.assert_allclose(whole.affine, AFFINE, atol=1e-5)
    assert facts == {"empty": False} and file.uncertainty.kind == kind
    part, facts = make_reply(labelmap(), IMAGE, {**asked, "result_region": True}, uncertainty=doubt)
    cut = read(part.uncertainty, tmp_path)
    np.testing.assert_array_equal(cut.array, doubt[19:32, 6:19, 3:16])
    np.testing.assert_allclose(cut.affine, read(part, tmp_path).affine, atol=1e-5)


def test_a_map_that_nobody_makes_is_refused():
    with pytest.raises(InputError, match="output_uncertainty = True: this model makes no uncertainty map"):
        make_reply(labelmap(), IMAGE, {"output_uncertainty": "true"})
