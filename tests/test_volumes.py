import bz2
import gzip
import io
import struct
import time
import tracemalloc
import zlib

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as PilImage
from scipy.spatial.transform import Rotation

from sam_infer.errors import InputError
from sam_infer.formats import picture as pictures
from sam_infer.formats import stored
from sam_infer.geometry import LPS_TO_RAS
from sam_infer.volumes import empty_labelmap, fit_labelmap, labelmap_bytes, read_image, read_labelmap
from tests.conftest import save_png

ROTATION = Rotation.from_euler("xyz", [10, 20, 170], degrees=True).as_matrix()
AFFINE = np.eye(4)
AFFINE[:3, :3] = ROTATION * [1.5, 2.0, 3.0]
AFFINE[:3, 3] = [30, -20, 7]


@pytest.fixture
def volume(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (7, 5, 3)).astype(np.int16)
    path = tmp_path / "case.nii.gz"
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return array, path


def test_nifti_is_read_as_stored(volume):
    array, path = volume
    image = read_image(path)
    np.testing.assert_array_equal(image.array, array)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    assert not image.flat


def test_nrrd_is_read_in_ras(volume, tmp_path):
    array, path = volume
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "case.nrrd"), True)
    image = read_image(tmp_path / "case.nrrd")
    np.testing.assert_array_equal(image.array, array)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "1"])
def test_pictures_become_column_row_1(tmp_path, mode):
    grey = np.zeros((6, 9), np.uint8)
    grey[2, 7] = 200
    picture = PilImage.fromarray(grey)
    if mode == "I;16":
        picture = PilImage.fromarray(grey.astype(np.uint16))
    else:
        picture = picture.convert(mode, dither=PilImage.Dither.NONE) if mode == "1" else picture.convert(mode)
    picture.save(tmp_path / "picture.png")
    image = read_image(tmp_path / "picture.png")
    assert image.flat
    assert image.shape == (9, 6, 1)
    assert image.array.ndim == 3, "equal channels are one grey channel"
    assert image.array[7, 2, 0] > 0
    assert np.count_nonzero(image.array) == 1


def test_colour_keeps_three_channels(tmp_path):
    colour = np.zeros((6, 9, 3), np.uint8)
    colour[2, 7] = [200, 10, 30]
    assert read_image(save_png(tmp_path / "c.png", colour)).array.shape == (9, 6, 1, 3)


@pytest.mark.parametrize("kind", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("compress", [True, False])
def test_labelmap_lies_on_the_image(volume, tmp_path, kind, compress):
    """Read back by ITK, as 3D Slicer does: same grid, same place in the world."""
    _, path = volume
    image = read_image(path)
    labelmap = empty_labelmap(image.shape)
    labelmap[6, 1, 2] = 3
    (tmp_path / f"reply{kind}").write_bytes(labelmap_bytes(labelmap, image.affine, kind, compress=compress))
    reply, original = sitk.ReadImage(str(tmp_path / f"reply{kind}")), sitk.ReadImage(str(path))
    assert reply.GetSize() == original.GetSize()
    assert reply[6, 1, 2] == 3
    for index in [(0, 0, 0), (6, 1, 2)]:
        np.testing.assert_allclose(
            reply.TransformIndexToPhysicalPoint(index),
            original.TransformIndexToPhysicalPoint(index),
            atol=1e-4,
        )


def test_labelmap_of_a_picture_lies_on_it_in_itk(tmp_path):
    picture = save_png(tmp_path / "p.png", np.zeros((6, 9), np.uint8))
    image = read_image(picture)
    labelmap = empty_labelmap(image.shape)
    labelmap[7, 2, 0] = 1
    (tmp_path / "reply.nrrd").write_bytes(labelmap_bytes(labelmap, image.affine, ".nrrd"))
    reply, original = sitk.ReadImage(str(tmp_path / "reply.nrrd")), sitk.ReadImage(str(picture))
    assert reply.GetSize()[:2] == original.GetSize()
    assert reply[7, 2, 0] == 1
    np.testing.assert_allclose(
        reply.TransformIndexToPhysicalPoint((7, 2, 0))[:2], original.TransformIndexToPhysicalPoint((7, 2))
    )
    png = PilImage.open(io.BytesIO(labelmap_bytes(labelmap, image.affine, ".png")))
    assert np.asarray(png)[2, 7] == 1


def test_raw_nrrd_is_flat_in_i_fastest_order_as_ohif_reads_it(volume):
    labelmap = empty_labelmap((7, 5, 3))
    labelmap[1, 2, 0] = 9
    content = labelmap_bytes(labelmap, AFFINE, ".nrrd", compress=False)
    assert b"encoding: raw" in content
    data = content[content.index(b"\n\n") + 2 :]
    assert len(data) == 105
    assert data[1 + 2 * 7] == 9


def test_pynrrd_reads_the_compressed_reply(tmp_path):
    labelmap = empty_labelmap((7, 5, 3))
    labelmap[1, 2, 0] = 9
    (tmp_path / "r.nrrd").write_bytes(labelmap_bytes(labelmap, AFFINE, ".nrrd"))
    np.testing.assert_array_equal(nrrd.read(str(tmp_path / "r.nrrd"))[0], labelmap)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.nii.gz", b"not gzip"),
        ("broken.nii", b"x" * 400),
        ("broken.nrrd", b"NRRD0004\ntype: float\n\n"),
        ("broken.png", b"\x89PNG\r\n\x1a\n garbage"),
        ("empty.nii.gz", b""),
    ],
)
def test_damaged_files_are_refused_not_crashed_on(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"image = '{name}'") as caught:
        read_image(tmp_path / name)
    assert caught.value.status == 422


def test_truncated_nifti_is_refused(volume):
    _, path = volume
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="cannot be read"):
        read_image(path)


def test_unknown_kind_is_415(tmp_path):
    (tmp_path / "a.sh").write_bytes(b"#!/bin/sh")
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / "a.sh")
    assert caught.value.status == 415


def test_time_series_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "t.nii")
    with pytest.raises(InputError, match="time points"):
        read_image(tmp_path / "t.nii")


def test_label_of_another_shape_is_refused(volume, tmp_path):
    _, path = volume
    nib.save(nib.Nifti1Image(np.zeros((5, 7, 3), np.uint8), np.eye(4)), tmp_path / "l.nii")
    with pytest.raises(InputError, match=r"label = \(5, 7, 3\).*\(7, 5, 3\)"):
        read_labelmap(tmp_path / "l.nii", read_image(path))


def test_label_with_fractions_is_refused(volume, tmp_path):
    _, path = volume
    nib.save(nib.Nifti1Image(np.full((7, 5, 3), 0.5, np.float32), np.eye(4)), tmp_path / "l.nii")
    with pytest.raises(InputError, match="whole numbers"):
        read_labelmap(tmp_path / "l.nii", read_image(path))


# What a file claims


def refused(path, status, match):
    """Refused with a status and a text, in little time and memory."""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match) as caught:
            read_image(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == status
    assert time.perf_counter() - start < 2
    assert peak < 100 << 20


def write_nrrd(path, fields, data, **more):
    """An NRRD of one byte for each voxel, as its fields say."""
    fields = {"type": "uint8", "dimension": 3, "sizes": "4 3 2", "encoding": "raw", **fields, **more}
    head = "".join(f"{name}: {value}\n" for name, value in fields.items())
    path.write_bytes(b"NRRD0005\n" + head.encode() + b"\n" + data)
    return path


DATA = bytes(range(24))
VOXELS = np.arange(24).reshape((4, 3, 2), order="F")


@pytest.mark.parametrize("field", ["data file", "datafile"])
@pytest.mark.parametrize("blank", [b"\n", b""])
def test_nrrd_never_opens_another_file(tmp_path, field, blank):
    (tmp_path / "secret.raw").write_bytes(DATA)
    path = write_nrrd(tmp_path / "a.nrrd", {field: tmp_path / "secret.raw"}, b"")
    path.write_bytes(path.read_bytes()[:-1] + blank)
    refused(path, 422, f"{field}: the voxels must be in the header's own file")


@pytest.mark.parametrize("field", ["line skip: 1000000000000", "lineskip: 1", "byte skip: 4", "byteskip: -2"])
def test_nrrd_skips_nothing(tmp_path, field):
    name, value = field.split(": ")
    refused(write_nrrd(tmp_path / "a.nrrd", {name: value}, DATA), 422, name.replace("eskip", "e skip"))


@pytest.mark.parametrize(
    ("encoding", "data", "skip"),
    [
        ("raw", DATA, 0),
        ("raw", b"padding" + DATA, -1),
        ("gzip", gzip.compress(DATA), 0),
        ("gz", gzip.compress(DATA[:9]) + gzip.compress(DATA[9:]), -1),
        ("bzip2", bz2.compress(DATA), 0),
        ("ascii", " ".join(map(str, DATA)).encode(), 0),
    ],
)
def test_nrrd_encodings(tmp_path, encoding, data, skip):
    path = write_nrrd(tmp_path / "a.nrrd", {"encoding": encoding, "byte skip": skip}, data)
    np.testing.assert_array_equal(read_image(path).array, VOXELS)


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("raw", DATA[:-1]),
        ("raw", DATA + b"x"),
        ("gzip", gzip.compress(DATA[:-1])),
        ("gzip", gzip.compress(DATA + b"x")),
        ("gzip", gzip.compress(DATA)[:-1]),
        ("gzip", gzip.compress(DATA)[:-8] + b"????????"),
        ("bzip2", bz2.compress(DATA[:-1])),
        ("ascii", b"1 2 3"),
        ("hex", DATA.hex().encode()),
    ],
)
def test_nrrd_must_hold_what_it_says(tmp_path, encoding, data):
    refused(write_nrrd(tmp_path / "a.nrrd", {"encoding": encoding}, data), 422, "cannot be read")


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "ascii"])
@pytest.mark.parametrize(("sizes", "status"), [("1600 1600 1600", 422), ("4000 4000 4000", 413)])
def test_nrrd_that_claims_gigabytes_costs_nothing(tmp_path, encoding, sizes, status):
    data = {"raw": DATA, "gzip": gzip.compress(DATA), "bzip2": bz2.compress(DATA), "ascii": b"1 2"}[encoding]
    path = write_nrrd(tmp_path / "a.nrrd", {"encoding": encoding, "sizes": sizes}, data)
    if (encoding, status) == (
        "bzip2",
        422,
    ):  # no bound from the file's size: the array is allotted, not touched
        with pytest.raises(InputError, match="ends after 24"):
            read_image(path)
        return
    refused(path, status, "send at most 4294967296 bytes" if status == 413 else "cannot be read")


def nifti_bytes(shape, *, header=nib.Nifti1Header):
    claimed = header()
    claimed.set_data_shape(shape)
    claimed.set_data_dtype(np.uint8)
    claimed["vox_offset"] = claimed.single_vox_offset
    return claimed.binaryblock.ljust(claimed.single_vox_offset, b"\0")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("side", "status"), [(1600, 422), (2000, 413)])
def test_nifti_header_that_claims_gigabytes_costs_nothing(tmp_path, pack, side, status):
    path = tmp_path / ("a.nii" if pack is bytes else "a.nii.gz")
    path.write_bytes(pack(nifti_bytes((side, side, side))))
    refused(path, status, "bytes")


def test_nifti_voxels_far_behind_the_header_are_refused(tmp_path):
    content = bytearray(nifti_bytes((4, 3, 2)) + DATA)
    content[108:112] = struct.pack("<f", 1e12)
    (tmp_path / "a.nii").write_bytes(content)
    refused(tmp_path / "a.nii", 422, "not behind the header")


def test_what_is_inflated_is_bounded_by_the_header(tmp_path):
    """96 MB of zeros behind a header of 10 x 10 x 10 voxels."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(nifti_bytes((10, 10, 10)))]
    zeros = bytes(16 << 20)
    parts += [packer.compress(zeros) for _ in range(6)] + [packer.flush()]
    (tmp_path / "a.nii.gz").write_bytes(b"".join(parts))
    tracemalloc.start()
    assert read_image(tmp_path / "a.nii.gz").shape == (10, 10, 10)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [".nii.gz", ".nrrd"])
def test_a_label_of_too_many_voxels_is_refused_before_they_are_read(tmp_path, kind):
    """96 MB of zeros in a few kB, sent as the label of an image of 1000 voxels."""
    large = np.zeros((400, 500, 480), np.uint8, order="F")
    (tmp_path / f"m{kind}").write_bytes(labelmap_bytes(large, AFFINE, kind))
    (tmp_path / "a.nii").write_bytes(nifti_bytes((10, 10, 10)) + bytes(1000))
    image = read_image(tmp_path / "a.nii")
    del large
    tracemalloc.start()
    with pytest.raises(InputError, match=r"label = \(400, 500, 480\): .*shape \(10, 10, 10\)") as refusal:
        read_labelmap(tmp_path / f"m{kind}", image)
    assert refusal.value.status == 422
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_file_that_is_gone_is_named_without_its_folder(tmp_path):
    with pytest.raises(InputError, match=r"image = 'a\.nii': cannot be read \(No such file") as refusal:
        read_image(tmp_path / "a.nii")
    assert str(tmp_path) not in str(refusal.value)


def test_scaled_voxels_count_as_they_are_held(tmp_path, monkeypatch):
    image = nib.Nifti1Image(np.zeros((10, 10, 10), np.uint8), AFFINE)
    image.header.set_slope_inter(2.0, 1.0)
    nib.save(image, tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").array.dtype == np.float32
    monkeypatch.setattr(stored, "MAX_BYTES", 3999)
    refused(tmp_path / "a.nii", 413, "4000 bytes; send at most 3999")


def test_nifti_is_scaled_as_nibabel_scales(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (7, 5, 3)).astype(np.int16)
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_slope_inter(0.37, -1024.0)
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    np.testing.assert_allclose(
        read_image(tmp_path / "a.nii").array, array * 0.37 - 1024, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("kind", [".png", ".bmp"])
def test_pictures_have_a_limit_of_their_own(tmp_path, monkeypatch, kind):
    assert pictures.MAX_PIXELS == 64_000_000
    path = save_png(tmp_path / f"a{kind}", np.zeros((6, 9), np.uint8))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 53)
    refused(path, 413, "9 x 6 pixels; send at most 53 pixels")


def test_a_picture_that_claims_gigapixels_is_not_decoded(tmp_path):
    content = bytearray(save_png(tmp_path / "a.png", np.zeros((6, 9), np.uint8)).read_bytes())
    for size in (9000, 40_000):
        content[16:24] = struct.pack(">II", size, size)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / "a.png").write_bytes(content)
        refused(tmp_path / "a.png", 413, "send at most 64000000 pixels")


def test_a_picture_is_only_what_its_family_can_be(tmp_path):
    """PostScript would be run by Ghostscript."""
    PilImage.new("RGB", (9, 6)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    refused(tmp_path / "a.png", 422, "cannot identify")


# Where a file lies


def assert_lies_as_in_itk(path):
    image, original = read_image(path), sitk.ReadImage(str(path))
    dimension = original.GetDimension()
    for index in [(0, 0, 0), (3, 2, 1), (1, 0, 1)]:
        index = index[:dimension]
        place = (LPS_TO_RAS @ image.affine @ [*index, *[0] * (3 - dimension), 1])[:dimension]
        expected = original.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(place, expected, rtol=1e-5, atol=1e-5)


def without_codes(image):
    image.header["sform_code"] = image.header["qform_code"] = 0
    content = bytearray(image.header.binaryblock.ljust(352, b"\0") + image.dataobj.tobytes("F"))
    content[108:112] = struct.pack("<f", 352)
    return bytes(content)


@pytest.mark.parametrize("units", [0, 1, 2, 3, 11])
def test_nifti_without_a_place_lies_where_itk_puts_it(tmp_path, units):
    image = nib.Nifti1Image(VOXELS.astype(np.int16), None)
    image.header.set_zooms((2, 3, 4))
    image.header["xyzt_units"] = units
    (tmp_path / "a.nii").write_bytes(without_codes(image))
    assert_lies_as_in_itk(tmp_path / "a.nii")
    assert not read_image(tmp_path / "a.nii").placed


@pytest.mark.parametrize("units", [1, 2, 3, 0])
def test_nifti_units_become_mm(tmp_path, units):
    image = nib.Nifti1Image(VOXELS.astype(np.int16), AFFINE)
    image.header["xyzt_units"] = units
    nib.save(image, tmp_path / "a.nii")
    assert_lies_as_in_itk(tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").placed


@pytest.mark.parametrize("kind", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_2_is_read(tmp_path, kind, order):
    header = nib.Nifti2Header(endianness=order)
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti2Image(VOXELS.astype(np.int16), AFFINE, header), tmp_path / f"a{kind}")
    image = read_image(tmp_path / f"a{kind}")
    np.testing.assert_array_equal(image.array, VOXELS)
    assert image.array.dtype == np.int16
    np.testing.assert_allclose(image.affine, AFFINE)


@pytest.mark.parametrize("kind", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("row", [0.0, np.nan, 1e30])
def test_a_singular_affine_does_not_make_the_reply_fail(tmp_path, kind, row):
    image = nib.Nifti1Image(VOXELS.astype(np.uint8), AFFINE)
    image.header["srow_z"] = row
    content = bytearray(image.header.binaryblock.ljust(352, b"\0") + VOXELS.astype(np.uint8).tobytes("F"))
    content[108:112] = struct.pack("<f", 352)
    (tmp_path / "a.nii").write_bytes(content)
    image = read_image(tmp_path / "a.nii")
    assert not image.placed
    assert labelmap_bytes(empty_labelmap(image.shape), image.affine, kind)


@pytest.mark.parametrize("step", ["0", "1e30"])
@pytest.mark.parametrize("origin", ["(1,2,3)", "(nan,2,3)"])
def test_a_singular_nrrd_counts_as_one_without_a_place(tmp_path, step, origin):
    fields = {"space": "RAS", "space directions": f"({step},0,0) (0,1,0) (0,0,1)", "space origin": origin}
    image = read_image(write_nrrd(tmp_path / "a.nrrd", fields, DATA))
    np.testing.assert_array_equal(image.affine, LPS_TO_RAS)
    assert not image.placed


PLACE = {"space directions": "(2,0,0) (0,3,0) (0,0,4)", "space origin": "(5,6,7)"}


@pytest.mark.parametrize(
    "fields",
    [
        *[
            {"space": space, **PLACE}
            for space in ("left-posterior-superior", "RAS", "right-anterior-superior", "LAS", "scanner-xyz")
        ],
        {"space": "left-anterior-superior", **PLACE},
        {"space": "3D-right-handed", **PLACE},
        {"space": "3D-left-handed", **PLACE},
        {"space dimension": 3, **PLACE},
        {"space": "RAS", "space directions": PLACE["space directions"]},
        {"spacings": "2 3 4"},
        {"spacings": "2 3 nan"},
        {},
        {"dimension": 2, "sizes": "6 4", "spacings": "2 3"},
    ],
)
def test_nrrd_lies_where_itk_puts_it(tmp_path, fields):
    assert_lies_as_in_itk(write_nrrd(tmp_path / "a.nrrd", fields, DATA))
    assert read_image(tmp_path / "a.nrrd").placed == ("space directions" in fields)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "sizes": "1 4 3 2",
            "space directions": "none (2,0,0) (0,3,0) (0,0,4)",
            "kinds": "list domain domain domain",
        },
        {
            "sizes": "4 3 1 2",
            "space directions": "(2,0,0) (0,3,0) none (0,0,4)",
            "kinds": "domain domain vector domain",
        },
        {"sizes": "4 3 2 1", "kinds": "space space space stub"},
    ],
)
def test_a_list_of_one_is_no_axis(tmp_path, fields):
    space = {"space": "LPS"} if "space directions" in fields else {}
    path = write_nrrd(tmp_path / "a.nrrd", {"dimension": 4, **space, **fields}, DATA)
    np.testing.assert_array_equal(read_image(path).array, VOXELS)
    assert_lies_as_in_itk(path)


@pytest.mark.parametrize("kind", [".nrrd", ".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_colour_written_by_itk_has_its_channels_last(tmp_path, kind, shape):
    colour = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / f"c{kind}"))
    found = read_image(tmp_path / f"c{kind}").array
    assert found.shape == (4, 5, shape[0] if len(shape) == 3 else 1, 3)
    np.testing.assert_array_equal(np.moveaxis(found, (0, 1, 2), (2, 1, 0)).reshape(colour.shape), colour)


@pytest.mark.parametrize(
    "fields",
    [
        {"kinds": "RGB-color domain domain", "sizes": "3 4 2"},
        {"kinds": "domain domain vector", "sizes": "4 2 3"},
        {
            "sizes": "4 3 2",
            "space dimension": 2,
            "space directions": "(1,0) none (0,1)",
            "kinds": "domain vector domain",
        },
    ],
)
def test_the_channels_of_a_nrrd_are_its_axis_that_is_not_in_space(tmp_path, fields):
    path = write_nrrd(tmp_path / "c.nrrd", fields, DATA)
    np.testing.assert_array_equal(read_image(path).array[:, :, 0].transpose(1, 0, 2), sitk_array(path))


def sitk_array(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_rgb_voxels_are_colour(tmp_path):
    rgb = np.zeros((4, 3, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["G"][1, 2, 0] = 7
    nib.save(nib.Nifti1Image(rgb, AFFINE), tmp_path / "c.nii")
    found = read_image(tmp_path / "c.nii").array
    assert found.shape == (4, 3, 2, 3)
    assert found[1, 2, 0].tolist() == [0, 7, 0]


def test_three_time_points_are_no_colour(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.uint8), np.eye(4)), tmp_path / "t.nii")
    refused(tmp_path / "t.nii", 422, "several time points")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"dpi": (96, 72)}),
        ("a.jpg", {}),
        ("a.png", {"dpi": (96, 72)}),
        ("a.bmp", {"dpi": (96, 72)}),
        ("a.tif", {"dpi": (96, 72)}),
        ("a.tif", {"resolution": 40, "resolution_unit": 3}),
        ("a.tif", {}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_reply_lies_on_the_picture_in_itk(tmp_path, name, options, mode):
    PilImage.new(mode, (9, 6)).save(tmp_path / name, **options)
    assert_lies_as_in_itk(tmp_path / name)


@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("density", [(96, 72), (1, 1), (0, 0), (96, 0)])
def test_jfif_density_is_read_as_itk_reads_it(tmp_path, unit, density):
    PilImage.new("L", (9, 6)).save(tmp_path / "a.jpg", dpi=(96, 72))
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    start = content.index(b"JFIF\0") + 7
    content[start : start + 5] = struct.pack(">BHH", unit, *density)
    (tmp_path / "a.jpg").write_bytes(content)
    assert_lies_as_in_itk(tmp_path / "a.jpg")


def test_a_grey_picture_stored_as_rgb_holds_no_more_than_its_bytes(tmp_path):
    grey = np.repeat(np.arange(54, dtype=np.uint8).reshape(6, 9, 1), 3, axis=2)
    array = read_image(save_png(tmp_path / "g.png", grey)).array
    while array.base is not None and isinstance(array.base, np.ndarray):
        array = array.base
    assert array.nbytes == 54


# Labels on their image


@pytest.fixture
def label(volume):
    _, path = volume
    labelmap = empty_labelmap((7, 5, 3))
    labelmap[1:4, 2:5, 0] = np.arange(1, 10).reshape(3, 3)
    return labelmap, read_image(path)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("kind", [".nii.gz", ".nrrd"])
def test_a_label_in_another_axis_order_is_turned_onto_the_image(label, tmp_path, axes, flips, kind):
    labelmap, image = label
    turn = np.array([[axes.index(a), flips[a]] for a in range(3)])
    turned = nib.orientations.apply_orientation(labelmap, turn)
    affine = image.affine @ nib.orientations.inv_ornt_aff(turn, labelmap.shape)
    (tmp_path / f"l{kind}").write_bytes(labelmap_bytes(turned, affine, kind))
    found, lies = fit_labelmap(tmp_path / f"l{kind}", image)
    np.testing.assert_array_equal(found, labelmap)
    assert found.flags.f_contiguous
    assert lies == (axes == (0, 1, 2) and flips == (1, 1, 1))
    np.testing.assert_array_equal(read_labelmap(tmp_path / f"l{kind}", image), labelmap)


def test_a_label_saved_as_closest_canonical_is_turned_back(label, tmp_path):
    labelmap, image = label
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(labelmap, image.affine)), tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(read_labelmap(tmp_path / "l.nii.gz", image), labelmap)


@pytest.mark.parametrize("turn", [0, 45, 135])
def test_rounded_headers_are_the_same_place(label, tmp_path, turn):
    """Also at 45 degrees, where no world axis is nearest."""
    labelmap, image = label
    affine = image.affine.copy()
    affine[:3, :3] = Rotation.from_euler("z", turn, degrees=True).as_matrix() * [0.7, 0.7, 3]
    nib.save(nib.Nifti1Image(labelmap, affine), tmp_path / "i.nii")
    nib.save(nib.Nifti1Image(labelmap, affine.round(3)), tmp_path / "l.nii")
    found, lies = fit_labelmap(tmp_path / "l.nii", read_image(tmp_path / "i.nii"))
    np.testing.assert_array_equal(found, labelmap)
    assert lies


@pytest.mark.parametrize("step", [(1, 0, 0), (0, 0, 0.3)])
def test_a_label_that_lies_elsewhere_is_refused(label, tmp_path, step):
    labelmap, image = label
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ step
    nib.save(nib.Nifti1Image(labelmap, affine), tmp_path / "l.nii.gz")
    with pytest.raises(InputError, match=r"label = 'l.nii.gz': .*elsewhere.*resample it") as caught:
        read_labelmap(tmp_path / "l.nii.gz", image)
    assert caught.value.status == 422


@pytest.mark.parametrize("affine", [np.eye(4), LPS_TO_RAS])
def test_a_label_without_a_place_is_taken_by_its_shape(label, tmp_path, affine):
    labelmap, image = label
    (tmp_path / "l.nii").write_bytes(labelmap_bytes(labelmap, affine, ".nii"))
    write_nrrd(tmp_path / "l.nrrd", {"sizes": "7 5 3", "spacings": "1 2 3"}, labelmap.tobytes("F"))
    for name in ("l.nii", "l.nrrd"):
        found, lies = fit_labelmap(tmp_path / name, image)
        np.testing.assert_array_equal(found, labelmap)
        assert not lies, "a viewer would show it elsewhere"


def test_an_image_without_a_place_takes_labels_by_their_shape(label, tmp_path):
    labelmap, _ = label
    nib.save(nib.Nifti1Image(labelmap, np.eye(4)), tmp_path / "i.nii")
    nib.save(nib.Nifti1Image(labelmap, AFFINE), tmp_path / "l.nii")
    found, lies = fit_labelmap(tmp_path / "l.nii", read_image(tmp_path / "i.nii"))
    np.testing.assert_array_equal(found, labelmap)
    assert not lies


def test_labels_of_a_picture_are_taken_by_their_shape(tmp_path):
    PilImage.new("L", (9, 6)).save(tmp_path / "a.jpg", dpi=(96, 72))
    image = read_image(tmp_path / "a.jpg")
    labelmap = empty_labelmap((9, 6, 1))
    labelmap[7, 2] = 3
    for kind in (".png", ".nrrd", ".nii.gz"):
        (tmp_path / f"l{kind}").write_bytes(labelmap_bytes(labelmap, image.affine, kind))
        found, lies = fit_labelmap(tmp_path / f"l{kind}", image)
        np.testing.assert_array_equal(found, labelmap)
        assert lies
    nib.save(nib.Nifti1Image(labelmap, AFFINE), tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(read_labelmap(tmp_path / "l.nii.gz", image), labelmap)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.5, 1e20, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_label_values_are_whole_numbers(label, tmp_path, value, dtype):
    labelmap, image = label
    spoilt = labelmap.astype(dtype)
    nib.save(nib.Nifti1Image(spoilt, image.affine), tmp_path / "l.nii")
    np.testing.assert_array_equal(read_labelmap(tmp_path / "l.nii", image), labelmap)
    spoilt[6, 4, 2] = value
    nib.save(nib.Nifti1Image(spoilt, image.affine), tmp_path / "l.nii")
    with pytest.raises(InputError, match="label values") as caught:
        read_labelmap(tmp_path / "l.nii", image)
    assert caught.value.status == 422
