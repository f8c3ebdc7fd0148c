"""Label maps as DICOM SEG: other implementations read what is written here."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pydicom_seg
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sr._concepts_dict import concepts
from pydicom.uid import generate_uid
from skimage.color import lab2rgb

from sam_infer.dicom.codes import property_codes
from sam_infer.dicom.seg import read_seg, referenced_series, write_seg
from sam_infer.dicom.series import Series, read_series
from sam_infer.errors import InputError
from sam_infer.geometry import LPS_TO_RAS
from tests.dicom_data import real_dicom, repaired_abdomen, unplaced, write_enhanced, write_series
from tests.test_dicom_series import ORIENTATIONS

SHAPE = (11, 7, 6)  # 77 pixels: frames do not end with a byte
NAMES = {1: "liver", 3: "left kidney"}


def scan(folder: Path, **options) -> Series:
    write_series(folder, np.zeros(SHAPE, np.int16), **options)
    return read_series(folder)


def drawn() -> np.ndarray:
    """Values 1 and 3, lopsided along every axis; slices 0 and 5 are empty."""
    labelmap = np.zeros(SHAPE, np.uint8, order="F")
    labelmap[1:4, 1:6, 1:3] = 1
    labelmap[0, 0:4, 2] = labelmap[3, 1:5, 3] = 1
    labelmap[7:11, 0:3, 2:5] = 3
    return labelmap


def written(labelmap: np.ndarray, series: Series, **options) -> bytes:
    how = {"names": NAMES, "description": "accepted", "creator": "Doe^Jane", "algorithm": None}
    return write_seg(labelmap, series, **{**how, **options})


def opened(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def by_name(labelmap: np.ndarray, found: dict[int, str], names: dict[int, str]) -> np.ndarray:
    """The label map in the values of ``names``."""
    values = {name: value for value, name in names.items()}
    result = np.zeros_like(labelmap)
    for value, name in found.items():
        result[labelmap == value] = values[name]
    return result


def placed(image: sitk.Image, series: Series) -> np.ndarray:
    """What another reader made of a SEG, on the series' voxels, where it may be cropped."""
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    between = np.linalg.inv(series.affine) @ LPS_TO_RAS @ lps
    result = np.zeros(series.array.shape[:3], np.uint8)
    array = sitk.GetArrayFromImage(image).T
    at = np.argwhere(array)
    result[tuple(np.rint(at @ between[:3, :3].T + between[:3, 3]).astype(int).T)] = array[tuple(at.T)]
    return result


def by_pydicom_seg(content: bytes, series: Series, folder: Path) -> tuple[np.ndarray, dict[int, str]]:
    read = pydicom_seg.MultiClassReader().read(opened(content))
    return placed(read.image, series), {n: item.SegmentLabel for n, item in read.segment_infos.items()}


def by_dcmqi(content: bytes, series: Series, folder: Path) -> tuple[np.ndarray, dict[int, str]]:
    (folder / "in.dcm").write_bytes(content)
    tool = [str(Path(sys.executable).parent / "segimage2itkimage"), "--mergeSegments", "-t", "nrrd"]
    subprocess.run(
        [*tool, "--inputDICOM", folder / "in.dcm", "--outputDirectory", folder],
        check=True,
        capture_output=True,
    )
    described = json.loads(next(folder.glob("*.json")).read_text())["segmentAttributes"]
    image = sitk.ReadImage(str(next(folder.glob("*.nrrd"))))
    return placed(image, series), {
        item["labelID"]: item["SegmentLabel"] for group in described for item in group
    }


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_what_is_written_is_read_by_all(tmp_path, name, reverse):
    series = scan(tmp_path / "s", affine=ORIENTATIONS[name], reverse=reverse)
    content = written(drawn(), series)
    labelmap, found = read_seg(content, series)
    assert found == {1: "liver", 2: "left kidney"}
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())
    for read in (by_pydicom_seg, by_dcmqi):
        labelmap, found = read(content, series, tmp_path)
        np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn(), read.__name__)


@pytest.mark.parametrize("reverse", [False, True])
def test_what_highdicom_writes_is_read(tmp_path, reverse):
    series = scan(tmp_path / "s", affine=ORIENTATIONS["oblique"], reverse=reverse)
    labelmap, found = read_seg(written_by_highdicom(drawn(), series, reverse=True), series)
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())


def written_by_highdicom(labelmap: np.ndarray, series: Series, *, reverse: bool = False, **options) -> bytes:
    """The slices from above to below with ``reverse``; ``options`` are highdicom's."""
    step = -1 if reverse else 1
    numbers = np.searchsorted(sorted(NAMES), labelmap) + (labelmap > 0)
    code = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    segments = [
        highdicom.seg.SegmentDescription(n, NAMES[value], code, code, "MANUAL")
        for n, value in enumerate(sorted(NAMES), 1)
    ]
    file = highdicom.seg.Segmentation(
        **{
            "source_images": [pydicom.dcmread(path) for path in series.slices[::step]],
            "pixel_array": np.ascontiguousarray(numbers.astype(np.uint8).T[::step]),
            "segmentation_type": "BINARY",
            "segment_descriptions": segments,
            "series_instance_uid": generate_uid(),
            "series_number": 1,
            "sop_instance_uid": generate_uid(),
            "instance_number": 1,
            "manufacturer": "tests",
            "manufacturer_model_name": "tests",
            "software_versions": "1",
            "device_serial_number": "1",
            **options,
        }
    )
    buffer = io.BytesIO()
    file.save_as(buffer)
    return buffer.getvalue()


def test_the_file_is_what_highdicom_makes_of_all_pixels(tmp_path):
    """It is given one of each slice, to save memory; these headers have no fault."""
    series = scan(tmp_path)
    ours, theirs = opened(written(drawn(), series)), opened(written_by_highdicom(drawn(), series))
    assert ours.PixelData == theirs.PixelData
    assert (
        ours.DimensionIndexSequence[0].DimensionIndexPointer
        == theirs.DimensionIndexSequence[0].DimensionIndexPointer
    )
    for mine, other in zip(
        ours.PerFrameFunctionalGroupsSequence, theirs.PerFrameFunctionalGroupsSequence, strict=True
    ):
        assert mine.SegmentIdentificationSequence == other.SegmentIdentificationSequence
        assert mine.PlanePositionSequence == other.PlanePositionSequence
        assert mine.FrameContentSequence == other.FrameContentSequence
        (mine_from,), (other_from,) = mine.DerivationImageSequence, other.DerivationImageSequence
        assert mine_from.DerivationCodeSequence[0].CodeValue == other_from.DerivationCodeSequence[0].CodeValue
        source = mine_from.SourceImageSequence[0].ReferencedSOPInstanceUID
        assert source == other_from.SourceImageSequence[0].ReferencedSOPInstanceUID
    assert ours.ReferencedSeriesSequence == theirs.ReferencedSeriesSequence
    measures = ours.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.SliceThickness, measures.SpacingBetweenSlices) == (2, 2)


def errors_of(path: Path, content: bytes) -> list[str]:
    """What a validator finds wrong with a SEG, which is written to ``path``."""
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    path.write_bytes(content)
    told = subprocess.run(["dciodvfy", "-new", path], check=False, capture_output=True, text=True)
    assert "Segmentation" in told.stderr + told.stdout
    return [line for line in told.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("by a model", {"algorithm": "sam", "colors": {1: (255, 0, 0)}}),
        ("empty", {}),
        ("picture", {}),
        ("enhanced", {"algorithm": "sam"}),
    ],
)
def test_a_validator_finds_no_error(tmp_path, kind, options):
    series = scan(tmp_path / "s")
    labelmap = np.zeros(SHAPE, np.uint8) if kind == "empty" else drawn()
    if kind == "picture":
        write_series(tmp_path / "p", np.zeros((*SHAPE[:2], 1), np.int16), modality="CR", change=unplaced)
        series, labelmap = read_series(tmp_path / "p"), labelmap[:, :, 2:3]
    elif kind == "enhanced":
        write_enhanced(tmp_path / "e" / "e.dcm", np.zeros(SHAPE, np.int16), order=[3, 0, 5, 4, 1, 2])
        series = read_series(tmp_path / "e")
    assert not errors_of(tmp_path / "seg.dcm", written(labelmap, series, **options))


def test_254_labels_keep_their_names(tmp_path):
    series = scan(tmp_path)
    labelmap = (np.arange(np.prod(SHAPE)) % 255).astype(np.uint8).reshape(SHAPE)
    names = {value: f"part {value}" for value in range(1, 255)}
    found, told = read_seg(written(labelmap, series, names=names), series)
    assert told == names
    np.testing.assert_array_equal(found, labelmap)


def test_an_empty_label_map_stays_empty(tmp_path):
    series = scan(tmp_path / "s")
    content = written(np.zeros(SHAPE, np.uint8), series)
    labelmap, found = read_seg(content, series)
    assert not labelmap.any()
    assert found == {1: "liver"}
    assert opened(content).NumberOfFrames == 1
    named = written(np.zeros(SHAPE, np.uint8), series, names={0: "background", 3: "lung"})
    assert read_seg(named, series)[1] == {1: "lung"} and not read_seg(named, series)[0].any()
    (of_series,) = opened(content).ReferencedSeriesSequence
    assert len(of_series.ReferencedInstanceSequence) == SHAPE[2]
    assert not by_dcmqi(content, series, tmp_path)[0].any()


def test_a_value_without_a_name_is_not_lost(tmp_path):
    series = scan(tmp_path)
    assert read_seg(written(drawn(), series, names={1: "liver"}), series)[1] == {1: "liver", 2: "label 3"}


def test_it_belongs_to_the_images(tmp_path):
    def japanese(data: Dataset, k: int) -> None:
        data.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        data.PatientName = "Yamada^Tarou=山田^太郎"
        data.PatientBirthDate, data.StudyDescription = "19701231", "Abdomen"

    series = scan(tmp_path, patient="P1", change=japanese)
    data = opened(written(drawn(), series, algorithm="samloop/sam", description="Söhne\\ 1"))
    images = [pydicom.dcmread(path) for path in series.slices]
    for name in ("PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "FrameOfReferenceUID"):
        assert data[name].value == images[0][name].value, name
    assert data.StudyDescription == "Abdomen"
    assert data.PatientName.ideographic == "山田^太郎"
    assert referenced_series(data) == images[0].SeriesInstanceUID != data.SeriesInstanceUID
    (of_series,) = data.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in of_series.ReferencedInstanceSequence] == [
        image.SOPInstanceUID for image in images
    ]
    for frame in data.PerFrameFunctionalGroupsSequence:
        uid = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        (image,) = (image for image in images if uid == image.SOPInstanceUID)
        assert frame.PlanePositionSequence[0].ImagePositionPatient == image.ImagePositionPatient
    assert data.SeriesDescription == "Söhne 1"
    assert data.ContentCreatorName == "Doe^Jane"
    assert {item.SegmentAlgorithmType for item in data.SegmentSequence} == {"SEMIAUTOMATIC"}
    assert {item.SegmentAlgorithmName for item in data.SegmentSequence} == {"samloop/sam"}


def test_drawn_by_hand_names_no_model(tmp_path):
    (first, _) = opened(written(drawn(), scan(tmp_path))).SegmentSequence
    assert first.SegmentAlgorithmType == "MANUAL"
    assert "SegmentAlgorithmName" not in first


def test_colours_are_kept(tmp_path):
    color = (230, 120, 40)
    (_, second) = opened(written(drawn(), scan(tmp_path), colors={3: color})).SegmentSequence
    scaled = np.array(second.RecommendedDisplayCIELabValue) / 65535
    rgb = lab2rgb(np.array([scaled[0] * 100, scaled[1] * 255 - 128, scaled[2] * 255 - 128]))
    np.testing.assert_allclose(rgb * 255, color, atol=1)


@pytest.mark.parametrize(
    ("name", "keyword", "side"),
    [("Liver", "Liver", None), ("kidney_left", "Kidney", "Left"), ("right lung", "Lung", "Right")],
)
def test_organs_have_their_codes(name, keyword, side):
    _, kind = property_codes(name)
    assert kind.CodeValue in concepts["SCT"][keyword]
    modifier = kind.get("SegmentedPropertyTypeModifierCodeSequence")
    assert (modifier[0].CodeMeaning if modifier else None) == side
    if modifier:
        assert modifier[0].CodeValue in concepts["SCT"][side]


def test_every_code_is_snomeds_own():
    from sam_infer.dicom import codes

    for value, meaning in [*codes._ANATOMY.values(), *codes._FINDINGS.values(), *codes._SIDES.values()]:
        keyword = "".join(word[0].upper() + word[1:] for word in meaning.split())
        assert value in {
            v for k, found in concepts["SCT"].items() if k.lower() == keyword.lower() for v in found
        }
    assert property_codes("thing 7")[1].CodeMeaning == "Tissue"


def test_a_radiograph_has_a_segmentation(tmp_path):
    write_series(tmp_path, np.zeros((11, 7, 1), np.int16), modality="CR", change=unplaced)
    series = read_series(tmp_path)
    labelmap, found = read_seg(written(drawn()[:, :, 2:3], series), series)
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn()[:, :, 2:3])


def test_frames_of_an_enhanced_image_are_named(tmp_path):
    order = [3, 0, 5, 4, 1, 2]
    write_enhanced(tmp_path / "e" / "e.dcm", np.zeros(SHAPE, np.int16), order=order)
    series = read_series(tmp_path / "e")
    content = written(drawn(), series)
    labelmap, found = read_seg(content, series)
    np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn())
    for read in (by_pydicom_seg, by_dcmqi):
        labelmap, found = read(content, series, tmp_path)
        np.testing.assert_array_equal(by_name(labelmap, found, NAMES), drawn(), read.__name__)
    data = opened(content)
    assert len(data.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 1
    for frame in data.PerFrameFunctionalGroupsSequence:
        number = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        k = order[number - 1]
        assert frame.PlanePositionSequence[0].ImagePositionPatient[2] == 2 * k


def test_images_without_uids_cannot_be_referred_to(tmp_path):
    def blank(data: Dataset, k: int) -> None:
        data.SOPInstanceUID = data.SeriesInstanceUID = data.StudyInstanceUID = ""

    series = scan(tmp_path / "anonymous", change=blank)
    with pytest.raises(InputError, match="'anonymous': its images have no UIDs"):
        written(drawn(), series)


def test_another_shape_is_refused(tmp_path):
    series = scan(tmp_path)
    with pytest.raises(InputError, match=r"label = \(11, 7, 5\): .*\(11, 7, 6\)"):
        written(drawn()[:, :, :5], series)
    with pytest.raises(InputError, match="shape"):
        written(drawn(), replace(series, array=series.array[:5]))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["abdomen", "ct_sts_001_rtstruct/image", "encodings/rle/001"])
def test_real_series_go_there_and_back(tmp_path, name):
    if name == "abdomen":
        repaired_abdomen(tmp_path / "s", compressed=True)
    series = read_series(tmp_path / "s" if name == "abdomen" else real_dicom(name))
    labelmap = np.zeros(series.array.shape, np.uint8, order="F")
    labelmap[20:90, 30:70, 1:3] = 1
    labelmap[100:131, 110:150, 0:2] = 3
    content = written(labelmap, series)
    for read in (by_pydicom_seg, by_dcmqi):
        other, found = read(content, series, tmp_path)
        np.testing.assert_array_equal(by_name(other, found, NAMES), labelmap, read.__name__)
    own, found = read_seg(content, series)
    np.testing.assert_array_equal(by_name(own, found, NAMES), labelmap)
