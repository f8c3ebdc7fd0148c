"""DICOM SEG of other makers: laid on the series by place, or refused with a reason."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from sam_infer.dicom.seg import read_seg
from sam_infer.dicom.series import Series, read_series
from sam_infer.errors import InputError
from sam_infer.volumes import Image, read_labelmap
from tests.dicom_data import real_dicom, write_series
from tests.test_dicom_seg import NAMES, SHAPE, by_name, drawn, opened, scan, written, written_by_highdicom
from tests.test_dicom_series import ORIENTATIONS, columns

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about what was damaged


def saved(data: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data)
    return buffer.getvalue()


def same_scan(folder: Path, series: Series, array: np.ndarray, affine: np.ndarray) -> Series:
    """Another grid of slices that calls itself the same series."""

    def uids(data: Dataset, k: int) -> None:
        data.FrameOfReferenceUID = series.header.FrameOfReferenceUID

    write_series(folder, array, affine=affine, series_uid=series.header.SeriesInstanceUID, change=uids)
    return read_series(folder)


def shifted(affine: np.ndarray, *voxels: float) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.array(voxels)
    return moved


@pytest.mark.parametrize("name", ["axial", "oblique"])
@pytest.mark.parametrize("flips", [(0,), (1,), (0, 1), (2,)])
def test_flipped_frames_are_placed_by_position(tmp_path, name, flips):
    series = scan(tmp_path / "s", affine=ORIENTATIONS[name])
    affine = series.affine.copy()
    for axis in flips:
        affine = shifted(affine, *[(SHAPE[axis] - 1) * (n == axis) for n in range(3)])
        affine[:3, axis] *= -1
    other = same_scan(tmp_path / "o", series, np.zeros(SHAPE, np.int16), affine)
    seen = np.flip(
        drawn(), [*flips, 2] if len(flips) == 1 and flips != (2,) else [f for f in flips if f != 2]
    )
    content = written(np.asfortranarray(seen), other)
    labelmap, found = read_seg(content, series)
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())


@pytest.mark.parametrize(
    ("affine", "axes"),
    [
        (columns((0, -2, 0), (0, 0, 2), (-2, 0, 0), origin=(0, 0, 0)), (1, 2, 0)),
        (columns((0, 0, 2), (-2, 0, 0), (0, -2, 0), origin=(0, 0, 0)), (2, 0, 1)),
    ],
)
def test_frames_across_the_slices_are_placed_by_position(tmp_path, affine, axes):
    series = scan(tmp_path / "s", affine=np.diag([-2.0, -2.0, 2.0, 1.0]))
    across = drawn().transpose(axes)
    other = same_scan(tmp_path / "o", series, np.zeros(across.shape, np.int16), affine)
    np.testing.assert_allclose(other.affine, affine, atol=1e-9)
    labelmap, found = read_seg(written(np.asfortranarray(across), other), series)
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())


def test_cropped_frames_are_placed_by_position(tmp_path):
    series = scan(tmp_path / "s")
    affine = shifted(series.affine, 1, 0, 1)
    other = same_scan(tmp_path / "o", series, np.zeros((10, 7, 4), np.int16), affine)
    labelmap, found = read_seg(written(np.asfortranarray(drawn()[1:, :, 1:5]), other), series)
    expected = drawn()
    expected[0] = 0
    expected[[9, 10], 0:3, 2:5] = 3
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), expected)


def overlap(data: Dataset) -> Dataset:
    """Segment 2 drawn on the pixels of segment 1 too, its frames first in the file."""
    groups, size = data.PerFrameFunctionalGroupsSequence, data.Rows * data.Columns
    bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder="little")[: size * len(groups)]
    frames = bits.reshape(len(groups), size)
    numbers = [group.SegmentIdentificationSequence[0].ReferencedSegmentNumber for group in groups]
    order = sorted(range(len(groups)), key=lambda n: -numbers[n])
    frames = frames[order].copy()
    frames[0] = 1
    data.PerFrameFunctionalGroupsSequence = [groups[n] for n in order]
    packed = np.packbits(frames.ravel(), bitorder="little").tobytes()
    data.PixelData = packed + b"\0" * (len(packed) % 2)
    return data


def test_of_overlapping_segments_the_higher_number_wins(tmp_path):
    series = scan(tmp_path)
    labelmap, _ = read_seg(saved(overlap(opened(written(drawn(), series)))), series)
    assert (labelmap[:, :, 2] == 2).all()
    assert (labelmap[:, :, 1] == (drawn()[:, :, 1] == 1)).all()


@pytest.mark.parametrize("packed", [False, True])
def test_fractions_count_from_one_half(tmp_path, packed):
    series = scan(tmp_path)
    values = np.linspace(0, 1, np.prod(SHAPE)).reshape(SHAPE[::-1])
    content = written_by_highdicom(
        np.ones(SHAPE, int),
        series,
        pixel_array=values,
        segmentation_type="FRACTIONAL",
        segment_descriptions=opened_segments(series),
        max_fractional_value=200,
        **({"transfer_syntax_uid": RLELossless} if packed else {}),
    )
    labelmap, _ = read_seg(content, series)
    np.testing.assert_array_equal(labelmap, (np.rint(values * 200) >= 100).T)


def opened_segments(series: Series) -> list:
    import highdicom

    content = written_by_highdicom(drawn(), series)
    return [highdicom.seg.SegmentDescription.from_dataset(opened(content).SegmentSequence[0])]


def test_numbers_above_255_are_counted_anew(tmp_path):
    series = scan(tmp_path)
    data = opened(written(drawn(), series))
    data.SegmentSequence[1].SegmentNumber = 300
    for group in data.PerFrameFunctionalGroupsSequence:
        item = group.SegmentIdentificationSequence[0]
        item.ReferencedSegmentNumber = {1: 1, 2: 300}[item.ReferencedSegmentNumber]
    labelmap, found = read_seg(saved(data), series)
    assert found == {1: "liver", 2: "left kidney"}
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())


def changed(series: Series, change: Callable[[Dataset], object]) -> bytes:
    data = opened(written(drawn(), series))
    change(data)
    return saved(data)


def set_spacing(data: Dataset) -> None:
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1.1, 1]


def set_positions(z: Callable[[float], float]) -> Callable[[Dataset], None]:
    def change(data: Dataset) -> None:
        for group in data.PerFrameFunctionalGroupsSequence:
            place = group.PlanePositionSequence[0]
            place.ImagePositionPatient = [*place.ImagePositionPatient[:2], z(place.ImagePositionPatient[2])]

    return change


def lose_positions(data: Dataset) -> None:
    for group in data.PerFrameFunctionalGroupsSequence:
        del group.PlanePositionSequence


REFUSED: dict[str, tuple[Callable[[Dataset], object], str]] = {
    "another series": (
        lambda data: setattr(data.ReferencedSeriesSequence[0], "SeriesInstanceUID", "1.2.9"),
        "drawn on another series .*1.2.9",
    ),
    "another world": (
        lambda data: setattr(data, "FrameOfReferenceUID", "1.2.7"),
        "another frame of reference .*1.2.7.*register",
    ),
    "no SEG": (lambda data: setattr(data, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "is no DICOM SEG"),
    "between slices": (set_positions(lambda z: z + 0.8), "do not lie on the slices.*0.4 voxels"),
    "other pixels": (set_spacing, "do not lie on the slices.*voxels apart.*resample"),
    "outside": (set_positions(lambda z: z + 40), "outside the slices"),
    "no place": (lose_positions, "no place in the patient"),
    "undescribed": (lambda data: data.SegmentSequence.pop(), "segment 2 is drawn but not described"),
    "pixels cut": (lambda data: setattr(data, "PixelData", data.PixelData[:30]), "pixels end after 30 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_lie_on_the_series_is_refused(tmp_path, name):
    change, words = REFUSED[name]
    series = scan(tmp_path)
    with pytest.raises(InputError, match=f"label = .*{words}") as refusal:
        read_seg(changed(series, change), series)
    assert refusal.value.status == 422


def test_a_path_is_read_and_named(tmp_path):
    series = scan(tmp_path / "s")
    (tmp_path / "seg.dcm").write_bytes(written(drawn(), series))
    assert read_seg(tmp_path / "seg.dcm", series)[0].any()
    (tmp_path / "seg.dcm").write_bytes(b"no DICOM")
    with pytest.raises(InputError, match=r"label = 'seg.dcm': cannot be read as a DICOM SEG"):
        read_seg(tmp_path / "seg.dcm", series)


def test_damage_at_random_is_read_or_refused(tmp_path):
    series = scan(tmp_path)
    content, outcomes = written(drawn(), series), set()
    for seed in range(400):
        chance, damaged = random.Random(seed), bytearray(content)
        for _ in range(chance.randrange(1, 9)):
            damaged[chance.randrange(132, len(content))] = chance.randrange(256)
        try:
            read_seg(bytes(damaged), series)
            outcomes.add("read")
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# dcmqi's own files, whose label maps it gives as NRRD.


def truth(path: Path, series: Series) -> np.ndarray:
    return read_labelmap(path, Image(array=series.array, affine=series.affine, key=(), flat=False))


@pytest.mark.real_data
@pytest.mark.parametrize("size", ["23x38x3", "24x38x3"])
def test_dcmqi_frames_that_end_within_a_byte(size):
    folder = real_dicom("seg_dcmqi/data/segmentations") / size
    series = read_series(folder / "image")
    labelmap, found = read_seg(folder / "seg" / "label.seg", series)
    assert found == {1: "Liver"}
    np.testing.assert_array_equal(labelmap, truth(folder / "nrrd" / "label.nrrd", series))


@pytest.mark.real_data
def test_dcmqi_segments_overlap():
    folder = real_dicom("seg_dcmqi/data/segmentations")
    series = read_series(folder / "ct-3slice")
    labelmap, found = read_seg(folder / "partial_overlaps.dcm", series)
    assert list(found.values()) == ["GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE"]
    maps = [truth(folder / f"partial_overlaps-{n}.nrrd", series) for n in (1, 2, 3)]
    np.testing.assert_array_equal(labelmap, np.max(maps, axis=0))
    assert sum((of_one > 0).astype(int) for of_one in maps).max() > 1
    liver, _ = read_seg(folder / "liver.dcm", series)
    np.testing.assert_array_equal(liver > 0, truth(folder / "liver_seg.nrrd", series) > 0)


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["noppv", "ppv5"])
def test_dcmqi_label_maps_in_dicom(kind):
    folder = real_dicom("seg_dcmqi/data/segmentations")
    series = read_series(folder / "24x38x3" / "image")
    labelmap, found = read_seg(folder / f"sparse-labelmap-{kind}.dcm", series)
    assert found == {1: "Liver"}
    expected = truth(folder / f"sparse_labelmap_{kind}_seg.nrrd", series) == 1  # 5 is the padding
    np.testing.assert_array_equal(labelmap == 1, expected)
    assert set(np.unique(labelmap)) == {0, 1}
