"""`pseudo_label`: what a training stored is shown, the newest first, and nothing where there is nothing."""

import json

import nibabel as nib
import numpy as np
import pytest

SHAPE = (24, 20, 6)


@pytest.fixture
def stored(served, tmp_path):
    """A function that stores a block of a label under a tag, as a trainer does; gone afterwards."""
    from monailabel.interfaces.utils.app import app_instance

    client, _, _ = served
    datastore = app_instance().datastore()
    done = []

    def store(tag, value, *, ts=None, image="ct"):
        array = np.zeros(SHAPE, np.uint8)
        array[4:10, 5:9, 1:5] = value
        nib.save(nib.Nifti1Image(array, np.diag([1, 1, 2, 1])), tmp_path / "l.nii.gz")
        info = {"provenance": {"trainer": tag, "key": "k"}}
        datastore.save_label(image, str(tmp_path / "l.nii.gz"), tag, info)
        if ts is not None:
            datastore.update_label_info(image, tag, {"ts": ts})
        done.append((image, tag))

    yield client, store
    for image, tag in done:
        datastore.remove_label(image, tag)


def ask(client, output="json", image="ct", **params):
    return client.post(
        "/infer/pseudo_label",
        params={"image": image, "output": output},
        data={"params": json.dumps(params)},
    )


def test_nothing_is_listed_or_answered_while_nothing_is_stored(served):
    client, _, _ = served
    info = client.get("/info/").json()["models"]["pseudo_label"]
    assert info["labels"] == []
    assert "none is stored yet" in info["description"]
    assert info["type"] == "segmentation"
    reply = ask(client)
    assert reply.status_code == 404
    assert "image = 'ct'" in reply.json()["detail"]
    assert "/train/" in reply.json()["detail"]


def test_the_newest_is_shown_with_its_provenance(stored, tmp_path):
    client, store = stored
    store("weak_box", 2, ts=200)
    store("pseudo_label", 1, ts=100)
    reply = ask(client).json()
    assert reply["tag"] == "weak_box"
    assert reply["label_names"] == {"spleen": 2}
    assert reply["provenance"] == {"trainer": "weak_box", "key": "k", "stored": 200}
    store("self_training", 3, ts=300)
    file = ask(client, output="image", result_extension=".nii.gz")
    (tmp_path / "r.nii.gz").write_bytes(file.content)
    found = np.asarray(nib.load(tmp_path / "r.nii.gz").dataobj)
    assert (found == 3).sum() == 6 * 4 * 4
    assert (found[4:10, 5:9, 1:5] == 3).all()
    info = client.get("/info/").json()
    assert info["models"]["pseudo_label"]["labels"] == {"liver": 1, "spleen": 2, "aorta": 3}
    assert info["datastore"]["completed"] == 0, "a proposal accepts nothing"
    assert ask(client, image="photo").status_code == 404, "another case has none still"


def test_slicer_gets_values_without_holes(stored):
    client, store = stored
    store("pseudo_label", 3)
    reply = client.post("/infer/pseudo_label?image=ct", data={"params": "{}"})
    assert b'"label_names": {"aorta": 1}' in reply.content


@pytest.mark.parametrize("key", ["image_id", "sent_by"])
def test_a_client_cannot_name_another_case(stored, served, key):
    client, store = stored
    store("pseudo_label", 1)
    assert ask(client, image="photo", **{key: "ct"}).status_code == 404
    _, studies, _ = served
    files = {"file": ("ct.nii.gz", (studies / "ct.nii.gz").read_bytes())}
    sent = {"params": json.dumps({"image_id": "ct"})}
    assert client.post("/infer/pseudo_label?output=json", data=sent, files=files).status_code == 404
