"""The catalogue's engines: each is framed as its authors do, and answers what their own code answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.transform import resize

from sam_infer.engines import sam as sam_engine
from sam_infer.engines import sam2 as sam2_engine
from sam_infer.engines.catalog import CATALOG, PACKAGED
from sam_infer.engines.framing import MEDSAM, SAM, SAM_MED2D
from sam_infer.engines.location import VARIABLE, cache_folder, find, place
from sam_infer.engines.registry import NAMES, create_engine
from sam_infer.engines.sam import SamEngine
from sam_infer.engines.sam2 import Sam2Engine
from sam_infer.errors import InputError
from sam_infer.types import Prompts
from tests.sam_states import made, picture, table
from tests.test_sam_engine import SIDE, small_sam

pytestmark = pytest.mark.usefixtures("one_thread")
POINTS = np.array([[60, 20], [30, 50]], np.float32)
CASES = {
    "one point": Prompts(points=POINTS[:1], point_labels=np.array([1])),
    "points": Prompts(points=POINTS, point_labels=np.array([1, 0])),
    "box": Prompts(box=(5.0, 6.0, 80.0, 60.0)),
    "box and point": Prompts(points=POINTS[:1], point_labels=np.array([0]), box=(5.0, 6.0, 80.0, 60.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobile_sam", "sam_med2d"])
def test_answers_equal_those_of_the_authors_code(tmp_path, name):
    """The fixture holds what the authors' classes and predictor answered with the same made-up parameters."""
    answered = table(name)
    torch.save({"model": made(answered["shapes"])}, tmp_path / "made.pth")
    engine = create_engine(name, weights=tmp_path / "made.pth")
    embedding = engine.encode(picture().astype(np.float32) / 255)
    features = embedding.features["image"][0]
    probes = features[::37, :: features.shape[1] // 4, :: features.shape[2] // 4].flatten()
    np.testing.assert_allclose(probes, answered["embedding"], atol=1e-4)
    for case, prompts in CASES.items():
        found = engine.decode(embedding, [prompts])[0].logits
        wanted = np.reshape(answered["logits"][case], (-1, *found[0, ::15, ::15].shape))
        if name == "sam_med2d":  # The authors return the best of three, and the made-up ratings tie at 0.
            assert len(found) == 3
            assert min(np.abs(one[::15, ::15] - wanted[0]).max() for one in found) < 1e-4
        else:
            np.testing.assert_allclose(found[:, ::15, ::15], wanted, atol=1e-4)


@pytest.fixture(scope="module")
def sam():
    return small_sam()


@pytest.mark.parametrize("shape", [(75, 90), (90, 75), (300, 280)])
def test_medsam_is_framed_as_its_authors_do(sam, shape):
    """MedSAM_Inference.py: cubic to a square, stretched to 0..1, boxes by axis, probabilities enlarged."""
    image = np.resize(picture(), (*shape, 3))
    engine = SamEngine(model=sam, framing=MEDSAM)
    embedding = engine.encode(image.astype(np.float32) / 255)
    square = resize(image, (SIDE, SIDE), order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
    span = (square - float(square.min())) / (float(square.max()) - square.min())
    box = np.array([5.0, 6.0, 60.0, 50.0])
    with torch.inference_mode():
        features = sam.image_encoder(torch.from_numpy(span).float().permute(2, 0, 1)[None])
        corners = torch.from_numpy(box / np.array([*shape[::-1], *shape[::-1]]) * SIDE).float()[None]
        sparse, dense = sam.prompt_encoder(points=None, boxes=corners, masks=None)
        low, _ = sam.mask_decoder(
            image_embeddings=features,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        wanted = F.interpolate(low.sigmoid(), shape, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(embedding.features["image"], features, atol=1e-4, rtol=0)
    found = engine.decode(embedding, [Prompts(box=tuple(box))])[0]
    assert found.logits.shape == (1, *shape)
    np.testing.assert_allclose(1 / (1 + np.exp(-found.logits)), wanted, atol=1e-5)
    lone = engine.decode(embedding, [CASES["one point"]])[0]
    assert len(lone.logits) == 1


def test_a_grey_image_is_framed_as_its_three_equal_colours(sam):
    grey = picture()[..., 0].astype(np.float32) / 255
    for framing in (SAM, MEDSAM, SAM_MED2D):
        one, three = (framing.image(i, sam, torch.device("cpu")) for i in (grey, np.dstack([grey] * 3)))
        torch.testing.assert_close(one, three, rtol=0, atol=0)
        assert one.shape == (1, 3, SIDE, SIDE)


def test_an_image_of_one_value_is_framed(sam):
    flat = np.full((20, 30), 0.5, np.float32)
    for framing in (SAM, MEDSAM, SAM_MED2D):
        assert framing.image(flat, sam, torch.device("cpu")).isfinite().all()


def test_a_mask_fills_the_input_as_its_image_does():
    logits = torch.full((1, 40, 80), 5.0)
    kept, stretched = (framing.mask_input(logits, SIDE, SIDE // 4)[0, 0] for framing in (SAM, SAM_MED2D))
    assert kept.shape == stretched.shape == (SIDE // 4, SIDE // 4)
    half = SIDE // 8
    torch.testing.assert_close(stretched, torch.full_like(stretched, 5))
    torch.testing.assert_close(kept[:half], torch.full_like(kept[:half], 5))
    falling = torch.linspace(-5, 5, 40)[None, :, None].expand(1, 40, 80)
    assert (SAM.mask_input(falling, SIDE, SIDE // 4)[0, 0, half:] < -4.5).all(), "the padding is background"


def test_framings_have_fingerprints_of_their_own(sam):
    prints = {SamEngine(model=sam, framing=framing).fingerprint for framing in (SAM, MEDSAM, SAM_MED2D)}
    assert len(prints) == 3


def test_a_fingerprint_is_that_of_the_weights_that_were_loaded(tmp_path, monkeypatch):
    """Also where the file is replaced before anyone asks: embeddings on disk are kept under it."""
    monkeypatch.setattr(sam_engine, "load_network", lambda *_, **__: torch.nn.Identity())
    monkeypatch.setattr(sam2_engine, "load_sam2", lambda *_: torch.nn.Identity())
    for make in (SamEngine, Sam2Engine):
        weights = tmp_path / f"{make.__name__}.pt"
        weights.write_bytes(b"old")
        old = make(weights=weights).fingerprint
        loaded = make(weights=weights)
        assert loaded.model is not None
        weights.write_bytes(b"new")
        assert loaded.fingerprint == old != make(weights=weights).fingerprint


@pytest.mark.parametrize("size", [(1, 600), (600, 1)])
@pytest.mark.parametrize("framing", [SAM, MEDSAM, SAM_MED2D])
def test_a_slice_too_thin_for_the_input_is_one_pixel_of_it(sam, framing, size):
    engine = SamEngine(model=sam, framing=framing)
    point = Prompts(points=np.zeros((1, 2), np.float32), point_labels=np.array([1]))
    found = engine.decode(
        engine.encode(np.zeros(size, np.float32)), [point, Prompts(mask_logits=np.ones(size))]
    )
    assert all(one.logits.shape[1:] == size and np.isfinite(one.logits).all() for one in found)


def test_names_are_the_catalogues():
    assert tuple(CATALOG) == NAMES and NAMES[0] == "bundled"
    with pytest.raises(InputError, match="choose one of bundled, sam_vit_b"):
        create_engine("sam_vit_x")


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_whole(name):
    entry = CATALOG[name]
    assert entry.name == name and entry.title and entry.page and entry.licence and entry.code_licence
    assert entry.packaged == (not entry.addresses)
    assert all(address.startswith("https://") for address in entry.addresses)
    assert entry.packaged or entry.hash_source
    if entry.sha256 is not None:
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.size


def test_files_have_names_of_their_own():
    assert len({entry.file for entry in CATALOG.values()}) == len(CATALOG)


@pytest.mark.parametrize("name", [n for n in NAMES if not CATALOG[n].packaged])
def test_missing_weights_say_where_they_come_from_and_go(tmp_path, monkeypatch, name):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    entry = CATALOG[name]
    with pytest.raises(InputError) as told:
        create_engine(name)
    for text in (entry.file, str(tmp_path), f"samloop weights fetch {name}", entry.addresses[0], "--weights"):
        assert text in str(told.value)


def test_weights_are_found_where_they_are_given_then_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    entry = CATALOG["medico_sam"]
    assert cache_folder() == tmp_path / "cache" and place(entry) == tmp_path / "cache" / entry.file
    for folder in ("cache", "given"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / entry.file).write_bytes(b"x")
    assert find(entry) == tmp_path / "cache" / entry.file
    assert find(entry, tmp_path / "given") == tmp_path / "given" / entry.file
    (tmp_path / "tuned.pth").write_bytes(b"x")
    assert find(entry, tmp_path / "tuned.pth") == tmp_path / "tuned.pth"
    with pytest.raises(InputError, match=r"nowhere.*leave it out and run .*weights fetch medico_sam`"):
        find(entry, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nowhere.*name a file that is there, or none for the packaged one"):
        find(CATALOG["bundled"], tmp_path / "nowhere")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "samloop" / "weights"


def test_what_is_missing_in_a_given_folder_is_told_to_go_there(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    given = tmp_path / "given"
    given.mkdir()
    entry = CATALOG["sam_vit_b"]
    with pytest.raises(InputError) as told:
        find(entry, given)
    assert f"samloop weights fetch sam_vit_b --folder {given}`" in str(told.value)
    assert f"put it into {given} as {entry.file}" in str(told.value)
    (given / entry.file).write_bytes(b"half")
    with pytest.raises(InputError, match=f"has 4 bytes.*weights fetch sam_vit_b --folder {given}`"):
        find(entry, given)


def test_a_part_of_a_file_in_the_cache_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    (tmp_path / CATALOG["sam_vit_b"].file).write_bytes(b"x" * 100)
    for given in (None, tmp_path):
        with pytest.raises(InputError, match="has 100 bytes instead of 375042383"):
            create_engine("sam_vit_b", weights=given)


def test_the_bundled_weights_come_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert find(CATALOG["bundled"]) == PACKAGED / "bundled.safetensors"
    assert create_engine("bundled").name == "bundled"


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_tells_what_the_catalogue_has(name):
    entry = CATALOG[name]
    text = (Path(__file__).parents[1] / "docs" / "engines.md").read_text("utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    size = "in the package" if entry.packaged else f"{entry.size:,}" if entry.size else "size not known"
    for told in (f"`{entry.file}`, {size}", f"{entry.side} px", f"| {entry.licence} |"):
        assert told in row
    assert entry.commercial != ("not for commercial use" in row)
