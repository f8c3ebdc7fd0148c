"""DICOM SEG of series whose headers have faults, on which highdicom alone fails or misplaces the drawn."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from pydicom.dataset import Dataset

from sam_infer.dicom.seg import read_seg
from tests.test_dicom_seg import (
    NAMES,
    by_dcmqi,
    by_name,
    by_pydicom_seg,
    drawn,
    errors_of,
    opened,
    scan,
    written,
)


def bare(data: Dataset, k: int) -> None:
    """Only what says that these are slices of one series."""
    for name in (
        "PatientName",
        "PatientID",
        "PatientSex",
        "PatientBirthDate",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
        "ReferringPhysicianName",
        "FrameOfReferenceUID",
        "PositionReferenceIndicator",
        "Manufacturer",
        "SliceThickness",
        "ImageType",
    ):
        delattr(data, name)


def no_frame_of_reference(data: Dataset, k: int) -> None:
    data.FrameOfReferenceUID = ""


def thick(data: Dataset, k: int) -> None:
    data.SliceThickness, data.SpacingBetweenSlices = 5, 0.7


def shaken(data: Dataset, k: int) -> None:
    """The first coordinate, by which frames are sorted, goes up and down below a micrometre."""
    x, y, z = data.ImagePositionPatient
    data.ImagePositionPatient = [f"{x + (-1) ** k * 1e-7:.7f}", y, z]


def long_numbers(data: Dataset, k: int) -> None:
    data.ImageOrientationPatient = [1.0004, 0, 0, 0, 1.0004, 0]


def of_class(uid: str) -> Callable[[Dataset, int], None]:
    def change(data: Dataset, k: int) -> None:
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid

    return change


def lossy(data: Dataset, k: int) -> None:
    data.LossyImageCompression = "01"


FAULTS: dict[str, Callable[[Dataset, int], None]] = {
    "bare": bare,
    "no frame of reference": no_frame_of_reference,
    "thicker than their distance": thick,
    "shaken": shaken,
    "orientation of another length": long_numbers,
    "retired class": of_class("1.2.840.10008.5.1.4.1.1.5"),
    "private class": of_class("1.3.46.670589.11.0.0.12.2"),
    "lossy without a ratio": lossy,
}


@pytest.mark.parametrize("name", FAULTS)
def test_all_read_what_is_drawn_where_it_was(tmp_path, name):
    series = scan(tmp_path / "s", change=FAULTS[name])
    content = written(drawn(), series)
    for read in (by_pydicom_seg, by_dcmqi):
        labelmap, found = read(content, series, tmp_path)
        np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn(), read.__name__)
    labelmap, found = read_seg(content, series)
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())
    data = opened(content)
    assert len(data.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 6
    assert all(len(group.DerivationImageSequence) == 1 for group in data.PerFrameFunctionalGroupsSequence)
    (measures,) = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == measures.SpacingBetweenSlices == 2
    (reference,) = data.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
    assert reference.ReferencedSOPClassUID == series.header.SOPClassUID


@pytest.mark.parametrize("name", ["bare", "no frame of reference", "lossy without a ratio"])
def test_a_validator_finds_no_error(tmp_path, name):
    series = scan(tmp_path / "s", change=FAULTS[name])
    names = {1: "a" * 70, 3: "b\\" * 40}
    assert not errors_of(tmp_path / "seg.dcm", written(drawn(), series, names=names, algorithm="c" * 70))


def test_the_frame_of_reference_of_a_series_without_is_always_the_same(tmp_path):
    series = scan(tmp_path, change=bare)
    first, second = (opened(written(drawn(), series)) for _ in range(2))
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID


def test_what_the_standard_does_not_know_is_copied(tmp_path):
    def odd(data: Dataset, k: int) -> None:
        data.PatientSex, data.StudyDate, data.StudyTime = "W", "2024", "nine"

    with warnings.catch_warnings(action="ignore"):
        data = opened(written(drawn(), scan(tmp_path, change=odd)))
        assert (data.PatientSex, data.StudyDate, data.StudyTime) == ("W", "2024", "nine")


def test_nobody_is_told_of_the_patient(tmp_path, caplog):
    series = scan(tmp_path, patient="Secret")
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True, action="always") as told:
        written(drawn(), series, creator="Secret")
        written(np.zeros_like(drawn()), series)
    assert "Secret" not in caplog.text + "".join(str(warning.message) for warning in told)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_white_and_black_are_colours(tmp_path):
    content = written(drawn(), scan(tmp_path), colors={1: (255, 255, 255), 3: (0, 0, 0)})
    white, black = (item.RecommendedDisplayCIELabValue for item in opened(content).SegmentSequence)
    assert white[0] == 65535 and black[0] == 0


def test_the_library_is_not_loaded_before_it_is_needed():
    code = "import sys, sam_infer.dicom.seg; sys.exit('highdicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
