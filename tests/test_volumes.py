import io

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as PilImage
from scipy.spatial.transform import Rotation

from sam_infer.errors import InputError
from sam_infer.volumes import empty_labelmap, labelmap_bytes, read_image, read_labelmap
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
