"""DICOM series as volumes: SimpleITK's series reader is the oracle, voxel for voxel and in place."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from sam_infer.dicom.series import read_series, save_volume
from sam_infer.geometry import LPS_TO_RAS, SAME_PLACE, turned_onto
from sam_infer.volumes import read_image
from tests.dicom_data import AXIAL, real_dicom, repaired_abdomen, unplaced, write_enhanced, write_series

SHAPE = (11, 7, 5)
VOLUME = np.random.default_rng(0).integers(-1000, 2000, SHAPE).astype(np.int16)


def turn(axis: int, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (n for n in range(3) if n != axis)
    matrix = np.eye(4)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def columns(*axes: tuple[float, float, float], origin=(3.5, -20.25, 100.0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = np.array(axes).T, origin
    return matrix


ORIENTATIONS = {
    "axial": AXIAL,
    "slices downwards": np.diag([-1.0, -1.0, -2.0, 1.0]),
    "columns flipped": np.diag([1.0, -1.0, 2.0, 1.0]),
    "rows flipped": np.diag([-1.0, 1.0, 2.0, 1.0]),
    "anisotropic": np.diag([-0.5, -0.8, 2.5, 1.0]),
    "sagittal": columns((0, -1, 0), (0, 0, -1), (-1.5, 0, 0)),
    "coronal": columns((-1, 0, 0), (0, 0, -1), (0, -3, 0)),
    "oblique": turn(0, 20) @ turn(1, -35) @ turn(2, 10) @ np.diag([-0.7, -0.7, 3.0, 1.0]),
}


def by_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What SimpleITK makes of a series: (I, J, K) values, and voxel to RAS."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return np.moveaxis(sitk.GetArrayFromImage(image), [0, 1, 2], [2, 1, 0]), LPS_TO_RAS @ lps


def assert_as_itk(folder: Path) -> None:
    series = read_series(folder)
    array, affine = by_itk(folder)
    np.testing.assert_array_equal(series.array, array)
    np.testing.assert_allclose(series.affine, affine, atol=1e-4)
    assert series.array.flags.f_contiguous


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_series_is_what_itk_reads(tmp_path, name, reverse):
    files = write_series(tmp_path, VOLUME, affine=ORIENTATIONS[name], reverse=reverse)
    assert_as_itk(tmp_path)
    series = read_series(tmp_path)
    again, apart = turned_onto(VOLUME, ORIENTATIONS[name], target=series.affine, shape=SHAPE)
    assert apart < 1e-3
    np.testing.assert_array_equal(series.array, again)
    assert series.array.dtype == np.int16
    at_first = np.allclose(series.affine[:3, 3], ORIENTATIONS[name][:3, 3], atol=1e-4)
    assert list(series.slices) == (files if at_first else files[::-1])
    assert series.header.SOPInstanceUID == pydicom.dcmread(series.slices[0]).SOPInstanceUID
    assert "PixelData" not in series.header


def test_slice_distance_comes_from_positions(tmp_path):
    def thick(data: Dataset, k: int) -> None:
        data.SliceThickness, data.SpacingBetweenSlices = "5", "7"

    write_series(tmp_path, VOLUME, change=thick)
    assert read_series(tmp_path).affine[2, 2] == 2


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        (VOLUME, {}),
        (VOLUME, {"slope": 2, "intercept": -1024}),
        (VOLUME, {"slope": 0.25, "intercept": -3.5}),
        (VOLUME.astype(np.uint16), {"intercept": 1}),
        ((VOLUME % 200).astype(np.uint8), {}),
    ],
    ids=["plain", "whole", "fractions", "unsigned", "bytes"],
)
def test_values_are_rescaled(tmp_path, stored, kind):
    write_series(tmp_path, stored, **kind)
    series = read_series(tmp_path)
    exact = stored * float(kind.get("slope", 1)) + kind.get("intercept", 0)
    np.testing.assert_array_equal(series.array, exact.astype(np.float32))
    np.testing.assert_array_equal(series.array, by_itk(tmp_path)[0].astype(np.float32))
    whole = (exact == np.rint(exact)).all() and exact.min() >= -32768 and exact.max() <= 32767
    assert series.array.dtype == (np.int16 if whole else np.float32)


def test_each_slice_has_its_own_slope(tmp_path):
    def slopes(data: Dataset, k: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = [1, 0.5, 3, 2, 1][k], [0, 1, -100000, 3, 4][k]

    files = write_series(tmp_path, VOLUME, modality="PT", change=slopes)
    array = read_series(tmp_path).array
    assert array.dtype == np.float32
    for k, file in enumerate(files):
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))[0].T
        np.testing.assert_array_equal(array[:, :, k], expected.astype(np.float32))


@pytest.mark.parametrize("signed", [False, True])
def test_overlays_in_unused_bits_are_no_values(tmp_path, signed):
    def bits(data: Dataset, k: int) -> None:
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, int(signed)

    values = (VOLUME.clip(-1000, 1000) + (0 if signed else 1000)).astype(np.int16)
    write_series(tmp_path, (values.astype(np.uint16) & 0x0FFF) | 0x4000, change=bits)
    np.testing.assert_array_equal(read_series(tmp_path).array, values)
    np.testing.assert_array_equal(by_itk(tmp_path)[0], values)


@pytest.mark.parametrize(
    "stored", [VOLUME, (VOLUME % 4096).astype(np.uint16), (VOLUME % 256).astype(np.uint8)]
)
def test_monochrome1_is_inverted_as_itk_does(tmp_path, stored):
    def inverted(data: Dataset, k: int) -> None:
        data.PhotometricInterpretation = "MONOCHROME1"
        if stored.dtype == np.uint16:
            data.BitsStored, data.HighBit = 12, 11

    write_series(tmp_path, stored, change=inverted, intercept=-100)
    array = read_series(tmp_path).array
    np.testing.assert_array_equal(array, by_itk(tmp_path)[0])
    assert np.unravel_index(array.argmax(), SHAPE) == np.unravel_index(stored.argmin(), SHAPE)


def test_a_radiograph_is_a_volume_of_one_slice(tmp_path):
    def radiograph(data: Dataset, k: int) -> None:
        unplaced(data, k)
        data.ImagerPixelSpacing = [0.3, 0.2]

    write_series(tmp_path, VOLUME[:, :, :1], modality="CR", change=radiograph)
    assert_as_itk(tmp_path)
    series = read_series(tmp_path)
    assert series.array.shape == (11, 7, 1)
    np.testing.assert_allclose(np.abs(np.diag(series.affine)), [0.2, 0.3, 1, 1])


def test_a_single_ct_slice_is_a_volume_of_one_slice(tmp_path):
    write_series(tmp_path, VOLUME[:, :, :1], affine=ORIENTATIONS["oblique"])
    assert_as_itk(tmp_path)


def test_monochrome1_is_inverted_within_its_bits(tmp_path):
    def signed(data: Dataset, k: int) -> None:
        data.PhotometricInterpretation, data.BitsStored, data.HighBit = "MONOCHROME1", 12, 11

    write_series(tmp_path, VOLUME, change=signed)
    np.testing.assert_array_equal(read_series(tmp_path).array, -1 - VOLUME)


@pytest.mark.parametrize("kind", ["RGB", "YBR_FULL"])
def test_an_ultrasound_keeps_its_colours(tmp_path, kind):
    colours = np.random.default_rng(1).integers(0, 256, (10, 8, 1, 3)).astype(np.uint8)

    def ultrasound(data: Dataset, k: int) -> None:
        unplaced(data, k)
        data.PhotometricInterpretation = kind

    files = write_series(tmp_path, colours, modality="US", change=ultrasound)
    array = read_series(tmp_path).array
    assert array.shape == (10, 8, 1, 3)
    assert array.dtype == np.uint8
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(files[0]))).transpose(2, 1, 0, 3)
    np.testing.assert_allclose(array.astype(int), expected.astype(int), atol=1)


@pytest.mark.parametrize("packed", [False, True])
def test_an_enhanced_image_is_the_volume_of_its_frames(tmp_path, packed):
    affine, order = ORIENTATIONS["oblique"], [3, 0, 4, 1, 2]
    file = tmp_path / "e" / "e.dcm"
    write_enhanced(file, VOLUME, affine=affine, order=order, intercepts=[0, 1, 2, 3, 4])
    if packed:
        data = pydicom.dcmread(file)
        data.compress(RLELossless)
        data.save_as(file)
    series = read_series(tmp_path / "e")
    expected, apart = turned_onto(VOLUME + np.arange(5), affine, target=series.affine, shape=SHAPE)
    assert apart < 1e-3
    np.testing.assert_array_equal(series.array, expected)
    assert series.slices == (file,)


def test_rle_is_decoded(tmp_path):
    for file in write_series(tmp_path, VOLUME, intercept=-7):
        data = pydicom.dcmread(file)
        data.compress(RLELossless)
        data.save_as(file)
    assert_as_itk(tmp_path)
    np.testing.assert_array_equal(read_series(tmp_path).array, VOLUME - 7)


@pytest.mark.parametrize("stored", [VOLUME, VOLUME * 0.5, VOLUME % 256], ids=["int16", "float32", "RGB"])
def test_a_saved_volume_is_read_back(tmp_path, stored):
    if stored.dtype == np.float64:
        write_series(tmp_path / "s", VOLUME, slope=0.5, affine=ORIENTATIONS["oblique"])
    elif stored is VOLUME:
        write_series(tmp_path / "s", VOLUME, affine=ORIENTATIONS["oblique"])
    else:
        rgb = np.stack([stored, stored[::-1], stored[:, ::-1]], axis=-1).astype(np.uint8)
        write_series(tmp_path / "s", rgb, affine=ORIENTATIONS["oblique"])
    series = read_series(tmp_path / "s")
    save_volume(series, tmp_path / "out" / "v.nii")
    image = read_image(tmp_path / "out" / "v.nii")
    np.testing.assert_array_equal(image.array, series.array)
    np.testing.assert_allclose(image.affine, series.affine, atol=1e-5)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["v.nii"]
    itk = sitk.ReadImage(str(tmp_path / "out" / "v.nii"))
    np.testing.assert_array_equal(
        np.moveaxis(sitk.GetArrayFromImage(itk), [0, 1, 2], [2, 1, 0]), series.array
    )


# Real series.


@pytest.mark.real_data
@pytest.mark.parametrize(
    "name",
    [
        "ct_abdomen_20",
        "ct_sts_001_rtstruct/image",
        "encodings/rle/001",
        "encodings/jpegls/001",
        "seg_dcmqi/data/segmentations/ct-3slice",
    ],
)
def test_real_series_are_what_itk_reads(name):
    assert_as_itk(real_dicom(name))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["rle", "jpegls"])
def test_decoded_pixels_are_the_ground_truth(name):
    truth = nib.load(real_dicom(f"encodings/{name}/001_ground_truth.nii.gz"))
    series = read_series(real_dicom(f"encodings/{name}/001"))
    expected, apart = turned_onto(
        np.asarray(truth.dataobj), truth.affine, target=series.affine, shape=series.array.shape
    )
    assert apart < SAME_PLACE
    np.testing.assert_array_equal(series.array, expected)


@pytest.mark.real_data
def test_a_legacy_converted_image_is_its_slices():
    folder = real_dicom("seg_dcmqi/data/segmentations/23x38x3")
    many, one = read_series(folder / "image"), read_series(folder / "multiframe")
    np.testing.assert_array_equal(one.array, many.array)
    np.testing.assert_allclose(one.affine, many.affine, atol=1e-6)


@pytest.mark.real_data
def test_compression_changes_nothing(tmp_path):
    repaired_abdomen(tmp_path / "plain")
    repaired_abdomen(tmp_path / "packed", compressed=True)
    plain, packed = read_series(tmp_path / "plain"), read_series(tmp_path / "packed")
    np.testing.assert_array_equal(plain.array, packed.array)
    assert plain.affine[2, 2] == 2  # although SliceThickness says 3
