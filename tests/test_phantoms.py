"""The phantoms: reproducible, complete, on the right side, of plausible density."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from trainers.phantoms import LABELS, main, make_phantom, write_phantoms

SHAPE = (72, 64, 24)
CASES = range(3)


@pytest.fixture(scope="module")
def cases():
    return [make_phantom(seed, SHAPE) for seed in CASES]


def _centre_mm(label, affine, name):
    return nib.affines.apply_affine(affine, np.argwhere(label == LABELS[name]).mean(0))


def test_the_same_seed_gives_the_same_case(cases):
    again = make_phantom(0, SHAPE)
    for first, second in zip(cases[0], again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(cases[0][1], cases[1][1])


def test_types_shapes_and_spacing(cases):
    for image, label, affine in cases:
        assert image.shape == label.shape == SHAPE
        assert image.dtype == np.int16
        assert label.dtype == np.uint8
        spacing = nib.affines.voxel_sizes(affine)
        assert np.all((spacing > 1) & (spacing < 12))
        assert spacing[0] * SHAPE[0] == pytest.approx(spacing[1] * SHAPE[1])


def test_every_organ_is_there(cases):
    for _, label, _ in cases:
        for name, value in LABELS.items():
            if name != "liver_lesion":
                assert (label == value).sum() > 100, name
        assert label.max() <= max(LABELS.values())
        liver, spleen = (label == LABELS["liver"]).sum(), (label == LABELS["spleen"]).sum()
        assert liver > 3 * spleen
    assert any((label == LABELS["liver_lesion"]).any() for _, label, _ in cases)


def test_sides_agree_with_the_affine(cases):
    for _, label, affine in cases:  # RAS mm: x grows towards the right of the patient
        middle = _centre_mm(label, affine, "aorta")
        assert _centre_mm(label, affine, "liver")[0] > middle[0]
        assert _centre_mm(label, affine, "kidney_right")[0] > middle[0]
        assert _centre_mm(label, affine, "kidney_left")[0] < middle[0]
        assert _centre_mm(label, affine, "spleen")[0] < middle[0]
        assert _centre_mm(label, affine, "liver")[1] > _centre_mm(label, affine, "kidney_right")[1]
        assert _centre_mm(label, affine, "liver")[2] > _centre_mm(label, affine, "kidney_right")[2]


def test_densities_are_plausible(cases):
    for image, label, _ in cases:
        median = {name: np.median(image[label == value]) for name, value in LABELS.items() if value < 6}
        assert 65 < median["liver"] < 130
        assert 60 < median["spleen"] < 140
        assert 70 < median["kidney_left"] < 200
        assert 70 < median["aorta"] < 200
        noise = image[label == LABELS["liver"]].std()
        assert 8 < noise < 40
        assert image[:2].mean() < -900  # air around the patient
        assert image.max() > 250  # bone


def test_lesions_are_darker_than_the_liver(cases):
    for image, label, _ in cases:
        lesion = image[label == LABELS["liver_lesion"]]
        if lesion.size > 20:
            assert lesion.mean() < image[label == LABELS["liver"]].mean() - 8


def test_writing_skips_what_is_there(tmp_path: Path):
    write_phantoms(tmp_path, count=1, seed=3, shape=(48, 48, 16))
    image = tmp_path / "phantom_000.nii.gz"
    truth = tmp_path / "truth" / "phantom_000.nii.gz"
    before = image.stat().st_mtime_ns, truth.stat().st_mtime_ns
    write_phantoms(tmp_path, count=2, seed=3, shape=(48, 48, 16))
    assert (image.stat().st_mtime_ns, truth.stat().st_mtime_ns) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["phantom_000.nii.gz", "phantom_001.nii.gz", "truth"]
    loaded, label = nib.load(image), nib.load(truth)
    assert loaded.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    assert loaded.shape == label.shape == (48, 48, 16)
    np.testing.assert_array_equal(loaded.affine, label.affine)
    assert np.asarray(loaded.dataobj).min() >= -1024


def test_a_bad_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        make_phantom(0, (10, 10, 10))


def test_command_line_writes_nothing_for_no_cases(tmp_path: Path, capsys):
    main([str(tmp_path / "new"), "--count", "0"])
    assert (tmp_path / "new" / "truth").is_dir()
    assert "0 phantoms" in capsys.readouterr().out
