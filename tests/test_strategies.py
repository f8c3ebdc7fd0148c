import time

import numpy as np
import pytest
import torch

from apps.samloop.strategies import First, RandomCase, Uncertainty
from sam_infer.errors import InputError
from sam_infer.networks.unet import UnetModel
from sam_infer.volumes import read_image
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
    for name in ("first", "random", "uncertainty"):
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
