"""`samloop predict`: label maps of a folder, without a datastore."""

import json

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image as PilImage

import sam_infer.engines.registry as registry
from apps.samloop.cli import main
from sam_infer.tasks.unet import UnetInfer
from tests.conftest import save_png
from tests.fakes import ThresholdEngine
from tests.unets import constant_unet

LABELS = {"liver": 1, "spleen": 2}
AFFINE = np.array([[0, -2, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1.0]])


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    made = ThresholdEngine()
    create = registry.create_engine
    monkeypatch.setattr(
        registry, "create_engine", lambda name, **how: made if name == "bundled" else create(name, **how)
    )
    return made


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.integers(0, 99, (12, 10, 4)).astype(np.int16), AFFINE), folder / "b.nii.gz")
    save_png(folder / "c.png", rng.integers(0, 255, (9, 14)).astype(np.uint8))
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def studies(tmp_path):
    constant_unet(tmp_path / "studies" / ".samloop" / "models" / "unet.safetensors", LABELS, winner=2)
    return tmp_path / "studies"


@pytest.fixture
def predict(tmp_path, images, studies):
    def run(*more, model="unet", out=None):
        folders = ["--images", str(images), "--out", str(out or tmp_path / "out")]
        if "--studies" not in more:
            folders += ["--studies", str(studies)]
        return main(["predict", "--model", model, *folders, "--labels", "liver,spleen", *more])

    return run


def report(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_label_maps_lie_on_their_images_and_nothing_else_is_written(predict, tmp_path, images, capsys):
    before = sorted(images.rglob("*"))
    assert predict() == 0
    assert "2 images: 2 done, 0 skipped, 0 failed" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b.nii.gz", "c.png", "report.json"]
    volume = nib.load(tmp_path / "out" / "b.nii.gz")
    assert volume.shape == (12, 10, 4)
    assert np.allclose(volume.affine, AFFINE)
    assert (np.asarray(volume.dataobj) == 2).all()
    assert (np.asarray(PilImage.open(tmp_path / "out" / "c.png")) == 2).all()
    assert sorted(images.rglob("*")) == before
    told = report(tmp_path)
    assert told["cases"]["b"]["label_names"] == {"spleen": 2}
    assert told["cases"]["b"]["score"] > 0.9
    assert told["model"] == "unet"
    assert len(told["fingerprint"]) == 16


def test_a_damaged_image_fails_and_the_others_are_done(predict, tmp_path, images, capsys):
    (images / "a.nii.gz").write_bytes(b"garbage")
    assert predict() == 1
    said = capsys.readouterr().out
    assert "failed a: image = 'a.nii.gz': cannot be read" in said
    assert "3 images: 2 done, 0 skipped, 1 failed" in said
    (images / "a.nii.gz").unlink()
    assert predict() == 0
    assert "2 images: 0 done, 2 skipped, 0 failed" in capsys.readouterr().out


def test_interrupted_it_goes_on_where_it_was(predict, tmp_path, monkeypatch, capsys):
    answer = UnetInfer.answer

    def interrupted(task, request):
        if request["image"].endswith("c.png"):
            raise KeyboardInterrupt
        return answer(task, request)

    monkeypatch.setattr(UnetInfer, "answer", interrupted)
    assert predict() == 130
    assert report(tmp_path)["ended"] is None
    monkeypatch.setattr(UnetInfer, "answer", answer)
    assert predict() == 0
    assert "1 done, 1 skipped" in capsys.readouterr().out


def test_what_is_done_again(predict, tmp_path, studies, capsys):
    predict()
    (tmp_path / "out" / "b.nii.gz").unlink()
    predict()
    assert "1 done, 1 skipped" in capsys.readouterr().out
    predict("--restart")
    assert "2 done, 0 skipped" in capsys.readouterr().out
    constant_unet(studies / ".samloop" / "models" / "unet.safetensors", LABELS, winner=1)
    predict()
    assert "2 done, 0 skipped" in capsys.readouterr().out
    assert (np.asarray(nib.load(tmp_path / "out" / "b.nii.gz").dataobj) == 1).all()
    predict("--param", "window_level=40", "--param", "window_width=400")
    assert "2 done, 0 skipped" in capsys.readouterr().out
    assert report(tmp_path)["settings"] == {"window_level": 40, "window_width": 400, "format": None}


def test_the_format_can_be_chosen(predict, tmp_path):
    assert predict("--format", "nrrd") == 0
    assert (nrrd.read(str(tmp_path / "out" / "b.nrrd"))[0] == 2).all()
    assert (tmp_path / "out" / "c.nrrd").is_file()
    assert predict("--format", "png") == 1, "a volume is no picture"
    assert "result_extension" in report(tmp_path)["cases"]["b"]["reason"]


def test_the_models_of_the_images_own_folder_are_the_default(predict, images, capsys):
    constant_unet(images / ".samloop" / "models" / "unet.safetensors", LABELS)
    assert predict("--studies", str(images)) == 0
    assert "2 done" in capsys.readouterr().out


def test_the_engine_refines_what_the_network_shows(predict, tmp_path, engine):
    assert predict(model="sam_auto_net") == 0
    assert engine.decoded
    assert report(tmp_path)["fingerprint"].endswith(engine.fingerprint)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "prompts",
            "model = 'sam_click_2d': only a model that needs no prompts runs by itself; choose one of unet",
        ),
        ("stored", "model = 'pseudo_label'"),
        ("untrained", "not trained yet"),
        ("same", "name another folder"),
        ("twins", "their results have one name"),
        ("empty", "holds no image file"),
        ("missing", "no such folder"),
        ("param", "send KEY=VALUE"),
    ],
)
def test_what_cannot_be_done_is_said(predict, images, studies, tmp_path, capsys, change, text):
    options, more = {}, []
    if change == "prompts":
        options["model"] = "sam_click_2d"
    elif change == "stored":
        options["model"] = "pseudo_label"
    elif change == "untrained":
        (studies / ".samloop" / "models" / "unet.safetensors").unlink()
    elif change == "same":
        options["out"] = images
    elif change == "twins":
        save_png(images / "b.png", np.zeros((4, 4), np.uint8))
    elif change in ("empty", "missing"):
        for path in images.iterdir():
            path.unlink()
        if change == "missing":
            images.rmdir()
    else:
        more = ["--param", "window_level"]
    assert predict(*more, **options) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
