"""Boxes of cases: kept whole, with their history, over REST and from clicks."""

import json

import pytest

from sam_infer.errors import InputError
from sam_infer.geometry import Region
from trainers.boxes import MAX_BOXES, BoxStore

WINDOW = {"window_level": 100, "window_width": 200}


def region(i0, i1, j0=0, j1=9, k=0):
    return Region(low=(i0, j0, k), high=(i1, j1, k))


@pytest.fixture
def store(tmp_path):
    return BoxStore(tmp_path / "boxes")


def test_boxes_come_back_as_they_were_put(store, tmp_path):
    assert store.ids() == []
    assert store.get("case.1") is None
    put = store.put("case.1", {"liver": [region(0, 9), region(20, 29)], "spleen": []}, who="ann")
    assert BoxStore(tmp_path / "boxes").get("case.1") == put
    assert put.labels == {"liver": (region(0, 9), region(20, 29)), "spleen": ()}
    assert put.who == "ann"
    assert put.record()["boxes"]["liver"] == [[0, 9, 0, 9, 0, 0], [20, 29, 0, 9, 0, 0]]
    store.put("b", {})
    assert store.ids() == ["b", "case.1"]


def test_what_is_replaced_or_removed_is_in_the_history(store, tmp_path):
    store.put("a", {"liver": [region(0, 9)]})
    store.put("a", {"liver": [region(5, 9)]})
    assert store.remove("a")
    assert not store.remove("a")
    assert store.get("a") is None
    kept = sorted((tmp_path / "history" / "boxes").iterdir())
    assert [json.loads(path.read_text())["boxes"]["liver"][0][0] for path in kept] == [0, 5]


def test_a_box_that_is_drawn_again_takes_the_place_of_the_old_one(store):
    """Boxes of ten pixels 1 apart share 9 of 11, more than half; 5 apart, they share 5 of 15."""
    store.add("a", "liver", [region(0, 9), region(0, 9)])
    first = store.add("a", "liver", [region(0, 9)])
    assert first.labels == {"liver": (region(0, 9),)}
    assert store.add("a", "liver", [region(0, 9)], who="ben") == first, "the same box changes nothing"
    assert store.add("a", "liver", [region(1, 10)]).labels["liver"] == (region(1, 10),)
    assert store.add("a", "liver", [region(6, 15)]).labels["liver"] == (region(1, 10), region(6, 15))
    assert store.add("a", "liver", [region(6, 15, k=1)]).labels["liver"][2] == region(6, 15, k=1)
    assert store.add("a", "spleen", [region(1, 10)]).labels["liver"][0] == region(1, 10)


def test_a_label_has_so_many_boxes_and_no_more(store):
    many = [region(20 * n, 20 * n + 9) for n in range(MAX_BOXES)]
    store.put("a", {"liver": many})
    with pytest.raises(InputError, match="64 at most"):
        store.add("a", "liver", [region(0, 9, k=5)])
    assert len(store.get("a").labels["liver"]) == MAX_BOXES


@pytest.mark.parametrize("content", ["{", "[]", '{"boxes": {"liver": [[1]]}, "who": "", "when": ""}', "\xff"])
def test_a_damaged_file_is_named_and_can_be_replaced(store, content):
    store.put("a", {})
    (store.folder / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="image = 'a': its stored boxes are damaged"):
        store.get("a")
    store.put("a", {"liver": [region(1, 2)]})
    assert store.get("a").labels == {"liver": (region(1, 2),)}


@pytest.mark.parametrize("name", ["../a", "a/b", ".a", ".."])
def test_no_file_outside_its_folder(store, name):
    with pytest.raises(InputError):
        store.put(name, {})


# Routes


def put(client, boxes, image="ct"):
    return client.put("/datastore/boxes", params={"image": image}, json={"boxes": boxes})


@pytest.fixture
def clean(served):
    client, studies, _ = served
    yield client, studies
    for name in client.get("/datastore/boxes").json()["images"]:
        client.delete(f"/datastore/boxes?image={name}")


def test_boxes_over_rest(clean):
    client, studies = clean
    assert client.get("/datastore/boxes").json() == {"images": []}
    assert client.get("/datastore/boxes?image=ct").json()["boxes"] == {}
    reply = put(client, {"liver": [[9, 4, 5, 8, 2, 2], [-5, 99, 0, 3, 1, 4]]})
    assert reply.status_code == 200, reply.text
    expected = {"liver": [[4, 9, 5, 8, 2, 2], [0, 23, 0, 3, 1, 4]]}
    assert reply.json()["boxes"] == expected, "sorted and clipped to the image"
    assert client.get("/datastore/boxes?image=ct").json() == reply.json()
    assert put(client, {"spleen": [[20, 25, 3, 6]]}, image="photo").json()["boxes"] == {
        "spleen": [[20, 25, 3, 6, 0, 0]]
    }
    assert client.get("/datastore/boxes").json() == {"images": ["ct", "photo"]}
    assert put(client, {}).json()["boxes"] == {}
    assert client.delete("/datastore/boxes?image=ct").json() == {"image": "ct"}
    assert client.delete("/datastore/boxes?image=ct").status_code == 404
    assert (studies / ".samloop" / "boxes" / "photo.json").is_file()


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        (None, "boxes = None"),
        ([[1, 2, 3, 4, 5, 6]], "send {"),
        ({"tumour": [[1, 2, 1, 2, 1, 1]]}, "it has liver, spleen, aorta"),
        ({"liver": [[1, 2, 3, 4]]}, "boxes.liver = [1, 2, 3, 4]"),
        ({"liver": [[90, 99, 1, 2, 1, 1]]}, "outside the image of shape (24, 20, 6)"),
        ({"liver": "all"}, "boxes.liver = 'all'"),
        ({"liver": [[1, 2, 1, 2, 1, 1]] * 65}, "65 boxes"),
    ],
)
def test_boxes_that_cannot_be(clean, boxes, text):
    client, _ = clean
    reply = put(client, boxes)
    assert reply.status_code == 400
    assert text in reply.json()["detail"]
    assert client.get("/datastore/boxes").json() == {"images": []}


def test_boxes_of_images_that_are_not_there(clean):
    client, _ = clean
    assert put(client, {}, image="nope").status_code == 404
    assert put(client, {}, image="../ct").status_code == 400
    assert client.get("/datastore/boxes?image=nope").status_code == 404
    assert client.delete("/datastore/boxes?image=nope").status_code == 404


def click(client, model="sam_click_2d", image="ct", files=None, **params):
    return client.post(
        f"/infer/{model}",
        params={"image": image, "output": "json"},
        data={"params": json.dumps({**WINDOW, **params})},
        files=files,
    )


def test_boxes_of_clicks_are_kept_where_that_is_asked_for(clean):
    client, _ = clean
    for model in ("sam_click_2d", "sam_click_3d"):
        assert client.get("/info/").json()["models"][model]["config"]["store_boxes"] is False
    sent = dict(roi=[9, 4, 5, 8, 2, 2], label="liver")
    assert "stored_boxes" not in click(client, **sent).json()
    assert "stored_boxes" not in click(client, **sent, store_boxes=False).json()
    assert client.get("/datastore/boxes").json() == {"images": []}
    reply = click(client, **sent, store_boxes="true")
    assert reply.json()["stored_boxes"] == {"label": "liver", "boxes": 1}
    reply = click(client, **sent, store_boxes=True, foreground=[[6, 6, 2]])
    assert reply.json()["stored_boxes"]["boxes"] == 1, "the same box as before"
    boxes = [[4, 9, 5, 8, 1, 1], [4, 9, 5, 8, 3, 3]]
    reply = click(client, "sam_click_3d", boxes=boxes, label="spleen", store_boxes=True)
    assert reply.json()["stored_boxes"] == {"label": "spleen", "boxes": 2}
    assert client.get("/datastore/boxes?image=ct").json()["boxes"] == {
        "liver": [[4, 9, 5, 8, 2, 2]],
        "spleen": boxes,
    }


def test_clicks_without_boxes_and_images_that_are_sent_along_store_none(clean):
    client, studies = clean
    assert "stored_boxes" not in click(client, foreground=[[6, 6, 2]], store_boxes=True).json()
    files = {"file": ("mine.nii.gz", (studies / "ct.nii.gz").read_bytes())}
    sent = dict(roi=[4, 9, 5, 8, 2, 2], label="liver", store_boxes=True)
    assert "stored_boxes" not in click(client, image="", files=files, **sent).json()
    assert client.get("/datastore/boxes").json() == {"images": []}


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        ({"label": "tumour"}, "label = 'tumour'"),
        ({}, "label = None"),
        ({"label": "liver", "store_boxes": "maybe"}, "store_boxes"),
        ({"label": "liver", "roi": [90, 99, 1, 2, 1, 1]}, "roi"),
    ],
)
def test_boxes_of_clicks_that_cannot_be_kept(clean, sent, text):
    client, _ = clean
    reply = click(client, **{"roi": [4, 9, 5, 8, 2, 2], "store_boxes": True, **sent})
    assert reply.status_code == 400
    assert text in reply.json()["detail"]
    assert client.get("/datastore/boxes").json() == {"images": []}
