import time

import numpy as np
import pytest
import torch

from apps.samloop.strategies import Disagreement, Diverse, First, RandomCase, Uncertainty
from apps.samloop.strategies.diverse import described
from sam_infer.embeddings import SliceEncoder
from sam_infer.errors import InputError
from sam_infer.networks.unet import UnetModel
from sam_infer.volumes import read_image
from tests.fakes import CoarseEngine, ThresholdEngine
from tests.loop_data import (
    Folder,
    one_thread,  # noqa: F401
    window_for,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Threshold(torch.nn.Module):
    """Foreground where grey lies above the middle."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return self.scale * torch.cat([0.5 - x, x - 0.5], dim=1)


@pytest.fixture
def store(tmp_path):
    folder = Folder(tmp_path)
    for name, grey in (("clear", 250), ("vague", 135), ("fair", 160)):
        image = np.zeros((40, 40), np.uint8)
        image[10:30, 10:30] = grey
        folder.add(name, image)
    folder.add_disc("done", 0)
    return folder


class Accepting(Folder):
    """Knows its accepted cases, as MONAI Label's datastores do."""

    def get_labeled_images(self):
        return [path.stem for path in (self.root / "labels").iterdir()]

    def get_image_uri(self, image_id):
        self.asked = [*getattr(self, "asked", []), image_id]
        return super().get_image_uri(image_id)


def uncertainty(model, **kwargs):
    return Uncertainty(model=lambda: model, window_for=window_for, read=read_image, **kwargs)


@pytest.fixture
def model():
    return UnetModel(network=Threshold().eval(), labels={"disc": 1}, size=32, fingerprint="f1")


def test_first_is_by_name_and_nothing_left_is_an_empty_answer(store, tmp_path):
    assert First()({}, store)["id"] == "clear"
    empty = Folder(tmp_path / "empty")
    empty.add_disc("done", 0)
    for strategy in (First(), RandomCase(), uncertainty(None)):
        assert strategy({}, empty) == {}


def test_random_repeats_with_a_seed_and_reaches_every_open_case(store):
    picks = [RandomCase()({"seed": seed}, store)["id"] for seed in range(30)]
    assert picks == [RandomCase()({"seed": seed}, store)["id"] for seed in range(30)]
    assert set(picks) == {"clear", "vague", "fair"}
    with pytest.raises(InputError, match="seed = 'x'"):
        RandomCase()({"seed": "x"}, store)


def test_uncertainty_picks_the_ambiguous_case(store, model):
    answer = uncertainty(model)({}, store)
    assert answer["id"] == "vague" and answer["strategy_used"] == "uncertainty" and answer["scored"] == 3
    assert answer["reason"] == "least confident of 3 drawn from 3 open cases"


def test_uncertainty_says_when_it_falls_back(store):
    answer = uncertainty(None)({"seed": 1}, store)
    assert answer["strategy_used"] == "random" and "no U-Net is published" in answer["reason"]
    assert answer["id"] == RandomCase()({"seed": 1}, store)["id"]


def test_scores_are_reused_until_the_model_or_the_file_changes(store, model):
    reads = []
    models = [model]

    def read(path):
        reads.append(path.stem)
        return read_image(path)

    strategy = Uncertainty(model=lambda: models[0], window_for=window_for, read=read)
    strategy({}, store)
    strategy({}, store)
    assert sorted(reads) == ["clear", "fair", "vague"]
    store.add("vague", np.zeros((40, 40), np.uint8))
    assert strategy({}, store)["id"] == "fair" and reads[3:] == ["vague"]
    models[0] = UnetModel(network=model.network, labels=model.labels, size=32, fingerprint="f2")
    strategy({}, store)
    assert len(reads) == 7


def test_only_so_many_cases_are_scored_and_unreadable_ones_are_told(store, model):
    few = uncertainty(model, candidates=2)
    assert few({}, store)["scored"] == 2 and "up to 2 drawn at random" in few.info()["description"]
    assert few({}, store)["reason"] == "least confident of 2 drawn from 3 open cases"
    assert uncertainty(model, seconds=0.0)({}, store)["scored"] == 1
    (store.root / "images" / "vague.png").write_bytes(b"broken")
    answer = uncertainty(model)({}, store)
    assert answer["id"] == "fair" and answer["unreadable"] == ["vague"]


ODD = [
    5,
    "x",
    [1],
    None,
    {"first": 5},
    {"first": {"ts": "soon"}},
    {"first": {"ts": None}},
    {"first": {"ts": {}}},
]


@pytest.mark.parametrize("strategy", [*ODD, {"first": {"ts": 10**400}}, {"first": {"ts": float("nan")}}])
def test_any_info_of_an_image_is_borne(store, strategy):
    info = store.info["clear"] = {"strategy": strategy}
    store.update_image_info = lambda name, new: store.info[name].update(new)
    assert First()({"client_id": "ann"}, store)["id"] == "clear"
    assert isinstance(info["strategy"], dict)


@pytest.mark.parametrize("strategy", ODD)
def test_the_server_answers_whatever_the_info_of_an_image_is(served, strategy):
    from monailabel.interfaces.utils.app import app_instance

    client, _, _ = served
    ids = client.get("/datastore/?output=all").json()["objects"]
    for name in ids:
        app_instance().datastore().update_image_info(name, {"strategy": strategy})
    for name in ("first", "random", "uncertainty", "disagreement", "diverse"):
        reply = client.post(f"/activelearning/{name}", json={})
        assert reply.status_code == 200, reply.text
        assert reply.json()["id"] in ids


def test_a_case_that_another_client_just_got_comes_last(store):
    now = int(time.time())
    store.info["clear"] = {"strategy": {"first": {"ts": now, "client_id": "ann"}}}
    assert First()({"client_id": "ben"}, store)["id"] == "fair"
    assert First()({"client_id": "ann"}, store)["id"] == "clear"
    store.info["clear"]["strategy"]["first"]["ts"] = now - 3600
    assert First()({"client_id": "ben"}, store)["id"] == "clear"
    given = {"strategy": {"first": {"ts": now, "client_id": "ann"}}}
    store.info = dict.fromkeys(("clear", "fair", "vague"), given)
    assert First()({"client_id": "ben"}, store)["id"] == "clear"


def disagreement(model, engine=None, **kwargs):
    encoder = SliceEncoder(engine=engine or ThresholdEngine())
    return Disagreement(
        model=lambda: model, encoder=encoder, window_for=window_for, read=read_image, **kwargs
    )


def test_disagreement_picks_the_case_on_which_the_engine_finds_something_else(tmp_path, model):
    """The U-Net sees two squares of 144 and 36 pixels, the engine the first alone: Dice 288 / 324."""
    folder = Folder(tmp_path)
    one = np.zeros((32, 32), np.uint8)
    one[2:14, 2:14] = 250
    two = one.copy()
    two[20:26, 20:26] = 250
    folder.add("alike", one)
    folder.add("disputed", two)
    folder.add("empty", np.zeros((32, 32), np.uint8))
    answer = disagreement(model)({}, folder)
    assert answer["id"] == "disputed"
    assert answer["strategy_used"] == "disagreement"
    assert answer["disagreement"] == pytest.approx(1 - 288 / 324, abs=1e-4)
    assert answer["scored"] == 3
    assert answer["reason"] == "most disputed of 3 drawn from 3 open cases"
    assert (answer["model"], answer["engine"]) == ("f1", "threshold")
    assert disagreement(None)({"seed": 1}, folder)["strategy_used"] == "random"
    assert "no U-Net is published" in disagreement(None)({}, folder)["reason"]


def test_disagreement_looks_at_a_few_slices_of_a_volume_once(tmp_path, model):
    import nibabel as nib

    array = np.zeros((32, 32, 100), np.uint8)
    array[2:14, 2:14, 20:90] = 250
    array[20:26, 20:26, 60:90] = 250
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "case.nii.gz")

    class Volumes(Folder):
        def get_image_uri(self, image_id):
            return str(tmp_path / f"{image_id}.nii.gz")

        def get_unlabeled_images(self, label_tag=None, labels=None):
            return ["case"]

    engine = ThresholdEngine()
    strategy = disagreement(model, engine)
    answer = strategy({}, Volumes(tmp_path))
    assert 0 < answer["disagreement"] < 1 - 288 / 324
    assert engine.encoded == 8
    strategy({}, Volumes(tmp_path))
    assert engine.encoded == 8


@pytest.fixture
def textures(tmp_path):
    """Pictures whose contrast rises from smooth to rough."""
    folder = Accepting(tmp_path)
    rng = np.random.default_rng(0)
    for name, contrast in (("smooth", 2), ("fine", 20), ("coarse", 60), ("rough", 110)):
        image = 120 + contrast * rng.choice([-1, 1], (32, 32))
        folder.add(name, image.astype(np.uint8))
    return folder


def diverse(engine, **kwargs):
    encoder = SliceEncoder(engine=engine, embedding_bytes=0)
    return Diverse(encoder=lambda: encoder, name="coarse", window_for=window_for, read=read_image, **kwargs)


def accept(folder, *names):
    for name in names:
        image = np.asarray(read_image(folder.get_image_uri(name)).array[:, :, 0].T)
        folder.add(name, image, np.ones_like(image))


def test_what_describes_an_image_is_mean_and_deviation_of_its_features(tmp_path):
    folder = Folder(tmp_path)
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    folder.add("half", half)
    image = read_image(folder.get_image_uri("half"))
    engine = CoarseEngine(side=32)
    vector = described(image, window_for(image, {}), SliceEncoder(engine=engine))
    assert vector == pytest.approx(np.array([0.5, 0.5]) / np.sqrt(0.5), abs=1e-3)


def test_diverse_begins_in_the_middle_and_goes_where_it_was_not(textures):
    """Farthest-first: from the middle to one end, then to the other."""
    strategy = diverse(CoarseEngine(side=32))
    first = strategy({}, textures)
    assert first["id"] == "coarse"
    assert (
        first["reason"]
        == "no accepted case to compare with: nearest to the mean of 4 drawn from 4 open cases"
    )
    accept(textures, "smooth")
    second = strategy({}, textures)
    assert second["id"] == "rough"
    assert second["reason"] == "least like 1 accepted cases of 3 drawn from 3 open cases"
    assert (second["scored"], second["compared"], second["engine"]) == (3, 1, "coarse")
    accept(textures, "rough")
    third = strategy({}, textures)
    assert third["id"] == "coarse"
    assert 0 < third["distance"] < second["distance"]


def test_images_are_described_once_and_only_so_many(textures):
    engine = CoarseEngine(side=32)
    strategy = diverse(engine, candidates=2, accepted=1)
    accept(textures, "smooth", "fine")
    engine.encoded = 0
    answer = strategy({"seed": 1}, textures)
    assert (answer["scored"], answer["compared"], engine.encoded) == (2, 1, 3)
    assert answer["reason"] == "least like 1 accepted cases of 2 drawn from 2 open cases"
    again = strategy({"seed": 1}, textures)
    assert again == answer
    assert engine.encoded == 3
    assert "up to 2 drawn at random, compared with up to 1" in strategy.info()["description"]


def test_diverse_heeds_its_time_and_bears_what_cannot_be_read(textures):
    accept(textures, "smooth", "fine")
    answer = diverse(CoarseEngine(side=32), seconds=0.0)({}, textures)
    assert (answer["scored"], answer["compared"]) == (1, 1)
    for name in ("coarse", "rough"):
        (textures.root / "images" / f"{name}.png").write_bytes(b"broken")
    answer = diverse(CoarseEngine(side=32))({"seed": 2}, textures)
    assert answer["strategy_used"] == "random"
    assert answer["reason"] == "none of 2 cases could be read"
