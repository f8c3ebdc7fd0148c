"""`samloop embed` on small folders: resumed, interrupted, bounded, and found again by a server's encoder."""

import nibabel as nib
import numpy as np
import pytest

import apps.samloop.embed as embed
from apps.samloop.cli import main
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.library import ImageLibrary
from tests.conftest import save_png
from tests.fakes import CoarseEngine, ThresholdEngine

SLICES = 4 + 1


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    rng = np.random.default_rng(0)
    array = rng.integers(0, 99, (12, 10, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "b.nii.gz")
    save_png(folder / "c.png", rng.integers(0, 255, (9, 14)).astype(np.uint8))
    (folder / "a_damaged.nii.gz").write_bytes(b"garbage")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def engine(monkeypatch):
    made = CoarseEngine(side=512)
    monkeypatch.setattr(embed, "create_engine", lambda *_, **__: made)
    return made


def run(studies, *more):
    return main(["embed", "--studies", str(studies), *more])


def project(tmp_path, megabytes):
    path = tmp_path / "project.yaml"
    path.write_text(f"limits: {{embeddings_disk_mb: {megabytes}}}\n")
    return "--project", str(path)


def test_all_slices_are_encoded_once_and_a_server_finds_them(studies, engine, capsys):
    assert run(studies) == 1, "one image could not be read"
    said = capsys.readouterr().out
    assert "skipped a_damaged.nii.gz: image = 'a_damaged.nii.gz': cannot be read" in said
    assert f"2 images, {SLICES} slices: {SLICES} encoded, 0 found, 1 images skipped" in said
    (studies / "a_damaged.nii.gz").unlink()
    assert run(studies) == 0
    assert f"0 encoded, {SLICES} found" in capsys.readouterr().out
    assert engine.encoded == SLICES
    store = EmbeddingStore(folder=studies / ".samloop" / "embeddings", limit=1 << 30, reserve=0)
    encoder, library = SliceEncoder(engine=engine, store=store), ImageLibrary(limit=1 << 24)
    image = library.read(studies / "b.nii.gz")
    assert all(encoder.embedding(image, k, library.window_for(image, {}))[1] for k in range(4))
    assert {p.name for p in studies.iterdir()} == {".samloop", "b.nii.gz", "c.png", "notes.txt"}


def test_the_engine_is_made_as_the_server_makes_it(studies, engine, monkeypatch, tmp_path):
    """Another runtime has other embeddings, which the server would not look for."""
    made = []

    def create(name, **options):
        made.append((name, options))
        return engine

    monkeypatch.setattr(embed, "create_engine", create)
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text("engine: {name: sam_vit_b, device: cpu, runtime: bf16}\n")
    run(studies, "--project", str(chosen), "--weights", str(tmp_path))
    run(studies, "--project", str(chosen), "--engine", "mobile_sam", "--runtime", "eager")
    assert made == [
        ("sam_vit_b", {"weights": tmp_path, "device": "cpu", "runtime": "bf16"}),
        ("mobile_sam", {"weights": None, "device": "cpu", "runtime": "eager"}),
    ]


def test_interrupted_it_goes_on_where_it_was(studies, engine, capsys, monkeypatch):
    encode = engine.encode

    def interrupted(image):
        if engine.encoded == 2:
            raise KeyboardInterrupt
        return encode(image)

    monkeypatch.setattr(engine, "encode", interrupted)
    assert run(studies) == 130
    assert "2 encoded, 0 found" in capsys.readouterr().out
    monkeypatch.setattr(engine, "encode", encode)
    run(studies)
    assert "3 encoded, 2 found" in capsys.readouterr().out


def test_too_small_a_limit_is_refused_with_what_is_needed(studies, engine, tmp_path, capsys):
    """An embedding of 512 x 427 values in half precision takes 0.42 MB."""
    assert run(studies, *project(tmp_path, 1)) == 2
    assert "limits.embeddings_disk_mb = 1: 5 slices need about 3 MB" in capsys.readouterr().err
    assert run(studies, *project(tmp_path, 1), "--partial") == 1
    said = capsys.readouterr().out
    assert "1 encoded, 1 found" in said
    assert "no more fit" in said


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("bundled", "nothing to encode beforehand"),
        ("off", "limits.embeddings_disk_mb = 0"),
        ("missing", "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(studies, engine, tmp_path, monkeypatch, capsys, change, text):
    if change == "bundled":
        monkeypatch.setattr(embed, "create_engine", lambda *_, **__: ThresholdEngine())
    more = project(tmp_path, 0) if change == "off" else ()
    assert run(studies / "none" if change == "missing" else studies, *more) == 2
    assert text in capsys.readouterr().err
    assert not (studies / ".samloop").exists()
