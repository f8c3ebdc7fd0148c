"""`/preference` over REST: candidates of the served engine, their file, answers, and what is refused."""

import nrrd
import numpy as np
import pytest

from sam_infer.candidates import SOURCES
from sam_infer.engines.location import find

BOX = [3, 4, 10, 9]
ASK = {"image": "ct", "label": "liver", "slice": 2, "box": BOX}


def ask(client, **changes):
    return client.post("/preference/candidates", json={**ASK, **changes})


def answer(client, name, **sent):
    return client.post("/preference/", json={"candidates": name, **sent})


@pytest.fixture
def clean(served):
    client, studies, engine = served
    yield client, studies, engine
    for name in client.get("/preference/").json()["images"]:
        client.delete(f"/preference/?image={name}")


@pytest.fixture
def soft(clean, monkeypatch):
    """The engine, less sure to the right: its probabilities fall over the columns of the block."""
    from sam_infer.types import Candidates

    client, studies, engine = clean
    plain = engine._one

    def one(grey, prompt):
        found = plain(grey, prompt)
        ramp = np.linspace(3, -2, grey.shape[1], dtype=np.float32)
        logits = np.where(found.logits > 0, ramp, np.float32(-5.0))
        more = np.concatenate([logits, logits - 1, found.logits])
        return Candidates(logits=more, iou=np.array([0.9, 0.5, 0.4], np.float32))

    monkeypatch.setattr(engine, "_one", one)
    return client, studies, engine


def test_candidates_are_made_fetched_and_ranked(soft, tmp_path):
    client, studies, _ = soft
    reply = ask(client)
    assert reply.status_code == 200, reply.text
    made = reply.json()
    assert made["thresholds"] == [0.3, 0.4, 0.5, 0.6]
    assert made["predicted_iou"] == []
    assert (made["source"], made["count"], made["slice"]) == ("thresholds", 4, 2)
    name = made["candidates"]

    sent = client.get(f"/preference/candidates/{name}")
    assert f'filename="{name}.nrrd"' in sent.headers["content-disposition"]
    (tmp_path / "bits.nrrd").write_bytes(sent.content)
    bits, header = nrrd.read(str(tmp_path / "bits.nrrd"))
    assert bits.shape == (24, 20, 6)
    assert np.abs(np.diag(header["space directions"])).tolist() == [1, 1, 2], "the image's grid"
    assert not bits[:, :, [0, 1, 3, 4, 5]].any()
    areas = [int((bits >> n & 1).sum()) for n in range(4)]
    assert areas == made["areas"]
    assert areas == sorted(areas, reverse=True)
    probability = 1 / (1 + np.exp(-np.linspace(3, -2, 24)[4:10]))
    assert [area // 4 for area in areas] == [(probability > t).sum() for t in made["thresholds"]]

    assert client.get("/preference/").json() == {"images": []}, "nobody has answered yet"
    reply = answer(client, name, ranking=[2, 0, 1, 3])
    assert reply.status_code == 200, reply.text
    assert reply.json()["ranking"] == [2, 0, 1, 3]
    assert client.get("/preference/").json() == {"images": ["ct"]}
    listed = client.get("/preference/?image=ct").json()
    assert listed["damaged"] == []
    (rated,) = listed["rated"]
    assert (rated["candidates"], rated["ranking"], rated["ratings"]) == (name, [2, 0, 1, 3], None)
    assert (rated["label"], rated["slice"], rated["box"]) == ("liver", 2, BOX)
    assert rated["engine"] == "threshold-1"
    assert (studies / ".samloop" / "preferences" / "ct" / f"{name}.npz").is_file()
    assert client.get(f"/preference/candidates/{name}").content == sent.content

    assert answer(client, name, ratings=[1, 3, 4, 2]).json()["ratings"] == [1, 3, 4, 2]
    assert len(client.get("/preference/?image=ct").json()["rated"]) == 1, "an answer that was changed"
    assert client.delete("/preference/?image=ct").json() == {"image": "ct"}
    assert client.delete("/preference/?image=ct").status_code == 404
    assert client.get(f"/preference/candidates/{name}").status_code == 404


def test_points_on_a_picture_and_all_masks_of_the_engine(soft):
    client, _, engine = soft
    sent = {"foreground": [[22, 5]], "background": [[2, 2]], "box": None, "slice": None}
    reply = ask(client, image="photo", source="masks", **sent)
    assert reply.status_code == 200, reply.text
    made = reply.json()
    assert made["predicted_iou"] == [0.9, 0.5, 0.4]
    assert made["count"] == 3
    assert made["slice"] == 0
    assert made["areas"][2] == 24
    prompt = engine.decoded[-1]
    assert prompt.points.tolist() == [[22, 5], [2, 2]]
    assert prompt.point_labels.tolist() == [1, 0]
    name = made["candidates"]
    assert "0 to 2 once" in answer(client, name, ranking=[0, 1, 2, 3]).json()["detail"]
    assert answer(client, name, ratings=[5, 5, 1]).status_code == 200
    (rated,) = client.get("/preference/?image=photo").json()["rated"]
    assert rated["points"] == [[22, 5], [2, 2]]


def test_candidates_of_segment_anything(clean, monkeypatch, one_thread):
    from monailabel.interfaces.utils.app import app_instance

    from sam_infer.engines.registry import entry_of
    from sam_infer.engines.sam import SamEngine

    client, _, _ = clean
    entry = entry_of("sam_tiny")
    engine = SamEngine(
        name="sam_tiny", weights=find(entry, None), architecture=entry.architecture, framing=entry.framing
    )
    monkeypatch.setattr(app_instance().models.encoder, "engine", engine)
    click = {"foreground": [[6, 6, 2]], "box": None}
    made = {source: ask(client, source=source, **click).json() for source in SOURCES}
    assert {source: one["count"] for source, one in made.items()} == {
        "thresholds": 4,
        "masks": 3,
        "dropout": 4,
    }
    assert len(made["masks"]["predicted_iou"]) == 3
    assert made["dropout"]["distinct"] > 1
    for one in made.values():
        ratings = [1 + n for n in range(one["count"])]
        assert answer(client, one["candidates"], ratings=ratings).status_code == 200
    rated = client.get("/preference/?image=ct").json()["rated"]
    assert {one["engine"] for one in rated} == {engine.fingerprint}
    assert {one["source"] for one in rated} == set(SOURCES)


def test_equal_candidates_are_counted(clean):
    client, _, _ = clean
    assert ask(client).json()["distinct"] == 1, "this engine is sure of every pixel"


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"image": "nope"}, 404, "image = 'nope'"),
        ({"image": None}, 404, "image = None"),
        ({"image": "../ct"}, 404, "image = '../ct'"),
        ({"image": ["ct"]}, 404, "image = ['ct']"),
        ({"label": "tumour"}, 400, "liver, spleen, aorta"),
        ({"label": None}, 400, "label = None"),
        ({"label": ["liver"]}, 400, "label = ['liver']"),
        ({"slice": 6}, 400, "from 0 to 5"),
        ({"slice": -1}, 400, "from 0 to 5"),
        ({"slice": None}, 400, "from 0 to 5"),
        ({"slice": True}, 400, "from 0 to 5"),
        ({"source": "guess"}, 400, "thresholds, masks, dropout"),
        ({"source": ["masks"]}, 400, "thresholds, masks, dropout"),
        ({"source": "masks"}, 422, "answers these prompts with one mask"),
        ({"source": "dropout"}, 422, "keeps no features"),
        ({"box": None}, 400, "send a box, or at least one foreground point"),
        ({"box": None, "background": [[6, 6, 2]]}, 400, "send a box, or at least one"),
        ({"box": [1, 2, 3]}, 400, "24 columns and 20 rows"),
        ({"box": [90, 2, 99, 3]}, 400, "box = [90, 2, 99, 3]"),
        ({"box": "all"}, 400, "box = 'all'"),
        ({"box": [1, 2, 3, "x"]}, 400, "[x0, y0, x1, y1]"),
        ({"foreground": [[6, 6, 3]]}, 400, "send points on slice 2"),
        ({"background": [[6, 6, 1]]}, 400, "send points on slice 2"),
        ({"foreground": [[99, 6, 2]]}, 400, "outside the image"),
    ],
)
def test_candidates_that_cannot_be(clean, changes, status, text):
    client, studies, _ = clean
    pending = studies / ".samloop" / "preferences" / ".pending"
    before = set(pending.glob("*"))
    reply = ask(client, **changes)
    assert reply.status_code == status, reply.text
    assert text in reply.json()["detail"]
    assert set(pending.glob("*")) == before


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        ({"candidates": None, "ranking": [0]}, 400, "candidates = None"),
        ({"candidates": 7, "ranking": [0]}, 400, "candidates = 7"),
        ({"candidates": "0" * 32, "ranking": [0]}, 404, "no such candidates"),
        ({"candidates": "../ct", "ranking": [0]}, 404, "no such candidates"),
        ({}, 400, "send one of the two"),
        ({"ranking": [0, 1, 2, 3], "ratings": [1, 2, 3, 4]}, 400, "send one of the two"),
        ({"ranking": [0, 0, 1, 2]}, 400, "ranking = [0, 0, 1, 2]"),
        ({"ranking": "best"}, 400, "ranking = 'best'"),
        ({"ratings": [1, 2, 3, 9]}, 400, "ratings = [1, 2, 3, 9]"),
    ],
)
def test_answers_that_cannot_be(clean, sent, status, text):
    client, _, _ = clean
    name = ask(client).json()["candidates"]
    reply = client.post("/preference/", json={"candidates": name, **sent})
    assert reply.status_code == status, reply.text
    assert text in reply.json()["detail"]
    assert client.get("/preference/").json() == {"images": []}


def test_bodies_that_are_no_objects(clean):
    client, _, _ = clean
    for path in ("/preference/", "/preference/candidates"):
        assert 400 <= client.post(path, json=[1]).status_code < 500
        assert (
            400
            <= client.post(path, content=b"{", headers={"content-type": "application/json"}).status_code
            < 500
        )
        assert 400 <= client.post(path).status_code < 500


def test_images_that_are_not_there(clean):
    client, _, _ = clean
    for method in (client.get, client.delete):
        assert method("/preference/?image=nope").status_code == 404
        assert method("/preference/?image=../ct").status_code == 400
    for name in ("0" * 32, "nope", "..%2f..%2fct", "*"):
        assert client.get(f"/preference/candidates/{name}").status_code == 404


def test_a_damaged_file_is_told_of(clean):
    client, studies, _ = clean
    name = ask(client).json()["candidates"]
    answer(client, name, ranking=[0, 1, 2, 3])
    (studies / ".samloop" / "preferences" / "ct" / f"{name}.npz").write_bytes(b"lost")
    assert client.get("/preference/?image=ct").json() == {"image": "ct", "rated": [], "damaged": [name]}
    assert client.get(f"/preference/candidates/{name}").status_code == 422
    assert answer(client, name, ranking=[0, 1, 2, 3]).status_code == 422
    assert client.get("/preference/").json() == {"images": ["ct"]}


def test_candidates_of_an_image_that_has_another_shape_by_now(clean):
    import nibabel as nib

    client, _, _ = clean

    def upload(shape):
        content = nib.Nifti1Image(np.full(shape, 300, np.int16), np.eye(4)).to_bytes()
        reply = client.put("/datastore/image?image=changing", files={"file": ("a.nii", content)})
        assert reply.status_code == 200, reply.text

    upload((12, 10, 3))
    name = ask(client, image="changing", slice=2, box=[1, 1, 5, 5]).json()["candidates"]
    upload((14, 10, 3))
    reply = client.get(f"/preference/candidates/{name}")
    assert reply.status_code == 409
    assert "another shape" in reply.json()["detail"]
    client.delete("/datastore/image?id=changing")
    assert client.get(f"/preference/candidates/{name}").status_code == 404
