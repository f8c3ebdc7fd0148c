"""What is no volume, or damaged, is refused with a reason and a remedy."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_pixel_data_frame
from pydicom.uid import RLELossless, generate_uid

from sam_infer.dicom.series import read_series
from sam_infer.errors import InputError
from tests.dicom_data import AXIAL, real_dicom, repaired_abdomen, unplaced, write_enhanced, write_series

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about what was damaged
VOLUME = np.random.default_rng(0).integers(-1000, 2000, (11, 7, 5)).astype(np.int16)


def moved(by):
    def change(data: Dataset, k: int) -> None:
        data.ImagePositionPatient = [str(v) for v in by(k)]

    return change


def set_values(**values):
    def change(data: Dataset, k: int) -> None:
        for name, value in values.items():
            setattr(data, name, value(k) if callable(value) else value)

    return change


REFUSED = {
    "gantry tilt": (VOLUME, moved(lambda k: (0, 0.5 * k, 2 * k)), "gantry tilt of 14.0 degrees.*resample"),
    "table moved": (VOLUME, moved(lambda k: (0, 9 * (k == 2), 2 * k)), "shifted sideways.*split"),
    "missing slice": (VOLUME, moved(lambda k: (0, 0, 2 * (k + (k > 2)))), "missing slices: 1 .*6 mm above"),
    "irregular": (VOLUME, moved(lambda k: (0, 0, [0, 2, 4, 7, 10][k])), r"irregular slice spacing \(2, 3 mm"),
    "duplicate": (VOLUME, moved(lambda k: (0, 0, 2 * min(k, 3))), "duplicate slices.*1 of 4 places.*6 mm"),
    "4D": (VOLUME[:, :, :4], moved(lambda k: (0, 0, 2 * (k % 2))), "2 images at each of 2 places.*4D"),
    "one place": (VOLUME, moved(lambda k: (0, 0, 5)), "all 5 images show the same place"),
    "two slices": (VOLUME[:, :, :2], None, "too few slices: 2, and 3.*whole series"),
    "mixed": (
        VOLUME,
        set_values(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, -1]),
        "mixed orientation: .* 2 different directions",
    ),
    "pixel sizes": (VOLUME, set_values(PixelSpacing=lambda k: [1, 1 + k]), "different pixel sizes"),
    "localizer": (VOLUME[:, :, :1], set_values(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "series": (
        VOLUME,
        set_values(SeriesInstanceUID=lambda k: f"1.2.{k % 2}"),
        r"several series.*\(2: 1.2.0, 1.2.1",
    ),
    "captures": (VOLUME, unplaced, "5 of 5 images have no place in the patient"),
    "no pixel size": (VOLUME, lambda data, k: delattr(data, "PixelSpacing"), "PixelSpacing"),
    "broken place": (VOLUME, set_values(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "damaged"),
    "structures": (VOLUME, lambda data, k: delattr(data, "Rows"), "no image series"),
    "segmentation": (
        VOLUME,
        set_values(SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", Modality="SEG"),
        r"no image series \(SEG\)",
    ),
    "film": (VOLUME[:, :, :1], set_values(NumberOfFrames=9), "9 frames without a place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_refused(tmp_path, name):
    volume, change, words = REFUSED[name]
    write_series(tmp_path, volume, change=change, series_uid="1.2.3")
    with pytest.raises(InputError, match=f"image = .*{words}") as refusal:
        read_series(tmp_path)
    assert refusal.value.status == 422
    assert ("'1.2.3'" in str(refusal.value)) == (name != "series")


def test_small_jitter_of_positions_is_no_reason(tmp_path):
    jitter = [0, 0.15, -0.1, 0.1, 0]  # of 2 mm; a tenth is the limit
    write_series(tmp_path, VOLUME, change=moved(lambda k: (0, 0, 2 * k + jitter[k])))
    np.testing.assert_allclose(read_series(tmp_path).affine, AXIAL)


def test_sizes_must_agree(tmp_path):
    uid = generate_uid()
    write_series(tmp_path, VOLUME, series_uid=uid)
    other = write_series(tmp_path / "other", VOLUME[:8, :, :1], series_uid=uid)[0]
    other.rename(tmp_path / "9.dcm")
    with pytest.raises(InputError, match=r"different sizes \(8 x 7, 11 x 7"):
        read_series(tmp_path)


def test_pictures_are_no_stack(tmp_path):
    write_series(tmp_path, VOLUME[:, :, :2], modality="CR", change=unplaced)
    with pytest.raises(InputError, match=r"2 single images \(CR\)"):
        read_series(tmp_path)


def test_uneven_enhanced_frames_are_refused(tmp_path):
    write_enhanced(tmp_path / "e" / "e.dcm", VOLUME, order=[0, 1, 3, 4])
    with pytest.raises(InputError, match="missing slices: 1"):
        read_series(tmp_path / "e")


def test_a_frame_that_is_not_there_is_missed(tmp_path):
    file = write_enhanced(tmp_path / "e" / "e.dcm", VOLUME)
    data = pydicom.dcmread(file)
    data.compress(RLELossless)
    data.PixelData = encapsulate(list(generate_pixel_data_frame(data.PixelData, 5))[:4])
    data.save_as(file)
    with pytest.raises(InputError, match=r"e\.dcm: 4 of 5 frames are there"):
        read_series(tmp_path / "e")


@pytest.mark.parametrize("how", ["empty", "text", "header", "pixels", "nothing"])
def test_damaged_files_are_named(tmp_path, how):
    file = write_series(tmp_path, VOLUME)[2]
    content = file.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"no DICOM " * 50,
        "header": content[:300],
        "pixels": content[:-20],
        "nothing": content[: content.index(b"\xe0\x7f\x10\x00")],
    }
    file.write_bytes(damaged[how])
    with pytest.raises(InputError, match="cannot be read") as refusal:
        read_series(tmp_path)
    assert refusal.value.status == 422
    assert "0003.dcm" in str(refusal.value)


def test_an_empty_folder_is_no_series(tmp_path):
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "DICOMDIR").write_bytes(b"x")
    with pytest.raises(InputError, match="no images"):
        read_series(tmp_path)


def fuzzed(folder: Path, file: Path, rounds: int) -> set[str]:
    """Read a folder while one of its files is damaged at random; what became of it."""
    content, outcomes = file.read_bytes(), set()
    for seed in range(rounds):
        chance, damaged = random.Random(seed), bytearray(content)
        if chance.random() < 0.2:
            del damaged[chance.randrange(132, len(content)) :]
        else:
            for _ in range(chance.randrange(1, 9)):
                damaged[chance.randrange(132, len(content))] = chance.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            read_series(folder)
            outcomes.add("read")
        except InputError:
            outcomes.add("refused")
    return outcomes


def test_damage_at_random_is_read_or_refused(tmp_path):
    file = write_series(tmp_path, VOLUME[:, :, :1])[0]
    data = pydicom.dcmread(file)
    data.compress(RLELossless)
    data.save_as(file)
    assert fuzzed(tmp_path, file, 300) == {"read", "refused"}


@pytest.mark.real_data
def test_damaged_jpeg_2000_is_read_or_refused(tmp_path):
    file = repaired_abdomen(tmp_path / "all", compressed=True)[0]
    (tmp_path / "one").mkdir()
    file = file.rename(tmp_path / "one" / file.name)
    assert fuzzed(tmp_path / "one", file, 40) == {"read", "refused"}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gantrytilting", "gantry tilt of 14.0 degrees"),
        ("notavolume", "all 4 images show the same place"),
        ("slicecount", "too few slices: 2"),
        ("sliceorientation", "mixed orientation"),
    ],
)
def test_malformed_series_are_refused(name, words):
    with pytest.raises(InputError, match=words):
        read_series(real_dicom(f"malformed/{name}/001"))


@pytest.mark.real_data
def test_structures_are_no_image():
    with pytest.raises(InputError, match=r"no image series \(RTSTRUCT\)"):
        read_series(real_dicom("ct_sts_001_rtstruct/mask"))
