"""Studies in a real PACS: what is listed and fetched, and what a fresh machine finds again."""

import io
import json
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tests.dicom_data import repaired_abdomen
from tests.pacs_app import (
    BLOCK,
    LABELS,
    accept,
    accepted,
    accepted_info,
    application,
    clicked,
    downloaded,
    foreign,
    pacs_store,
    scan,
    until,
)


@pytest.mark.parametrize("reverse", [False, True])
def test_click_accept_and_read_back_are_voxel_for_voxel_the_same(pacs, tmp_path, reverse):
    files, uid = scan(tmp_path / "scan", reverse=reverse, modality="MR" if reverse else "CT")
    pacs.stow(files)
    with application(pacs.url, tmp_path / "data") as client:
        assert client.get("/datastore/").json()["total"] == 1
        told, found, affine = clicked(client, uid, [6, 6, 3], "spleen")
        assert told["label_names"] == {"spleen": 1} and np.array_equal(found > 0, BLOCK)
        assert np.allclose(affine, np.diag([-1, -1, 2, 1]))
        reply = accept(client, uid, found, affine, label_info=[{"name": "spleen", "idx": 2, "value": 1}])
        sent = reply.json()["dicom_seg"]
        assert sent == {"state": "stored", "series": pacs.uids(Modality="SEG")[0], "reason": None}
        assert client.get("/datastore/").json()["completed"] == 1
        for name in (uid, sent["series"]):
            assert np.array_equal(accepted(client, name), BLOCK * LABELS["spleen"])
        assert client.get("/datastore/label", params={"label": uid, "tag": "other"}).status_code == 404
        stored = pydicom.dcmread(io.BytesIO(pacs.file(sent["series"])))
        assert [segment.SegmentLabel for segment in stored.SegmentSequence] == ["spleen"]
        assert stored.StudyInstanceUID == pydicom.dcmread(files[0]).StudyInstanceUID
        # the result itself as DICOM SEG, without label_info
        asked = {"foreground": [[6, 6, 3]], "label": "spleen"}
        reply = client.post(
            "/infer/sam_click_3d",
            params={"image": uid, "output": "dicom_seg"},
            data={"params": json.dumps(asked)},
        )
        assert reply.headers["content-type"] == "application/dicom"
        result = pydicom.dcmread(io.BytesIO(reply.content))
        assert result.SegmentSequence[0].SegmentLabel == "spleen"
        assert np.array_equal(result.pixel_array, stored.pixel_array)
        assert len(pacs.uids(Modality="SEG")) == 1


def test_a_fresh_machine_finds_all_that_was_accepted(pacs, tmp_path):
    masks = {}
    with application(pacs.url, tmp_path / "data") as client:
        for n in range(2):
            files, uid = scan(tmp_path / f"scan{n}", reverse=bool(n))
            pacs.stow(files)
            masks[uid] = np.where(BLOCK, 1 + 2 * n, 0)
            masks[uid][0, 0, n] = 2
        until(client, 2, "total")
        for uid, mask in masks.items():
            affine = clicked(client, uid, [6, 6, 3])[2]
            assert accept(client, uid, mask, affine).json()["dicom_seg"]["state"] == "stored"
    with application(pacs.url, tmp_path / "fresh") as client:
        found = client.get("/datastore/").json()
        assert (found["total"], found["completed"], found["label_tags"]) == (2, 2, {"final": 2})
        assert client.post("/activelearning/first", json={}).json() == {}
        trained = client.get("/datastore/", params={"output": "train"}).json()
        assert {case["image"].rpartition("/")[2] for case in trained} == {f"{uid}.nii" for uid in masks}
        assert all(uid in case["label"] for uid, case in zip(masks, sorted_by(trained, masks), strict=True))
        listed = client.get("/datastore/", params={"output": "all"}).json()["objects"]
        for uid, mask in masks.items():
            assert np.array_equal(accepted(client, uid), mask)
            info = accepted_info(client, uid)
            assert info["dicom_seg"]["state"] == "stored" and info["unknown"] == []
            assert listed[uid]["labels"]["final"]["info"]["dicom_seg"] == info["dicom_seg"]
    store = pacs_store(pacs.url, tmp_path / "third")  # as a training's own process begins
    assert len(store.counted().datalist()) == 2 and store.counted().get_unlabeled_images() == []
    assert not list((tmp_path / "third").glob("*.nii"))  # counting them fetches none
    assert len(store.datalist()) == 2 and store.get_unlabeled_images() == []


def test_every_kind_of_image_is_listed_and_nothing_else(pacs, tmp_path):
    uids = {}
    for kind in ("CT", "MR", "PT"):
        files, uids[kind] = scan(tmp_path / kind, modality=kind)
        pacs.stow(files)

    def report(data, _):
        data.Modality = "SR"

    pacs.stow(scan(tmp_path / "sr", change=report)[0][:1])
    content, _ = foreign(tmp_path / "CT", BLOCK, {1: "liver"})
    pacs.stow([content])
    store = pacs_store(pacs.url, tmp_path / "data")
    assert set(store.list_images()) == set(uids.values())
    assert store.get_labeled_images() == [uids["CT"]]
    info = store.get_image_info(uids["MR"])
    assert (info["Modality"], info["PatientID"], info["StudyDate"]) == ("MR", "TEST", "20240102")
    assert info["StudyInstanceUID"] == pydicom.dcmread(next((tmp_path / "MR").iterdir())).StudyInstanceUID
    filtered = pacs_store(pacs.url, tmp_path / "filtered", search={"Modality": "CT"})
    assert filtered.list_images() == [uids["CT"]] == filtered.get_labeled_images()
    some = pacs_store(pacs.url, tmp_path / "some", search={"PatientID": "TES*", "Modality": "PT"})
    assert some.list_images() == [uids["PT"]]
    assert filtered.get_image_uri(uids["MR"]) == ""


def test_what_is_no_volume_is_refused_once_and_stops_nothing(pacs, tmp_path):
    files, good = scan(tmp_path / "good")
    pacs.stow(files)
    bad = []
    for n in range(3):
        files, uid = scan(tmp_path / f"bad{n}", np.zeros((24, 20, 2)))
        pacs.stow(files)
        bad.append(uid)
    with application(pacs.url, tmp_path / "data") as client:
        until(client, 4, "total")
        reply = client.post("/infer/sam_click_3d", params={"image": bad[0]}, data={"params": "{}"})
        assert reply.status_code == 422 and "too few slices" in reply.json()["detail"]
        assert client.get("/datastore/").json()["refused"] == 1
        assert client.post("/activelearning/first", json={}).json()["id"] == good
        listed = client.get("/datastore/", params={"output": "all"}).json()
        assert set(listed["objects"]) & set(listed["refused"]) == set()
        assert bad[0] in listed["refused"]
        accept(client, good, BLOCK, clicked(client, good, [6, 6, 3])[2])
        # none is left, however many have to be tried for that
        assert client.post("/activelearning/random", json={}).json() == {}
        assert client.get("/datastore/").json() == {
            "total": 1, "completed": 1, "label_tags": {"final": 1}, "waiting": 0, "refused": 3
        }  # fmt: skip
        assert client.get("/datastore/image", params={"image": bad[1]}).status_code == 422


def test_a_series_that_grew_is_fetched_anew_unless_a_label_was_accepted_on_it(pacs, tmp_path):
    (one, first), (two, second) = scan(tmp_path / "one"), scan(tmp_path / "two")
    pacs.stow([*one[:4], *two[:4]])
    with application(pacs.url, tmp_path / "data") as client:
        until(client, 2, "total")
        for uid in (first, second):
            assert clicked(client, uid, [6, 6, 2], save_label=True)[1].shape == (24, 20, 4)
            assert client.get("/datastore/").json()["label_tags"]["original"]
        affine = clicked(client, first, [6, 6, 2])[2]
        accept(client, first, BLOCK[:, :, :4], affine)
        pacs.stow([*one, *two])
        shape = (24, 20, 4)
        for _ in range(100):
            shape = downloaded(client.get("/datastore/image", params={"image": second}))[0].shape
            if shape[2] == 6:
                break
            time.sleep(0.1)
        assert shape == (24, 20, 6)
        held = client.get("/datastore/image", params={"image": first})
        assert downloaded(held)[0].shape == (24, 20, 4)
        info = client.get("/datastore/image/info", params={"image": first}).json()
        assert "other instances" in info["pacs"]["changed"]
        assert "original" not in client.get("/datastore/?output=all").json()["objects"][second]["labels"]
        assert np.array_equal(accepted(client, first), BLOCK[:, :, :4])


def test_a_series_that_was_replaced_by_as_many_slices_is_fetched_anew(pacs, tmp_path, monkeypatch):
    files, uid = scan(tmp_path / "before")
    pacs.stow(files)
    store = pacs_store(pacs.url, tmp_path / "data")
    before = store._read(Path(store.get_image_uri(uid))).array
    study = str(pydicom.dcmread(files[0]).StudyInstanceUID)
    pacs.delete(uid)
    values = np.where(BLOCK, 0, 500)
    pacs.stow(scan(tmp_path / "after", values, series_uid=uid, study_uid=study)[0])
    assert np.array_equal(store._read(Path(store.get_image_uri(uid))).array, before)  # not asked again yet
    monkeypatch.setattr("apps.samloop.pacs.volumes.AGAIN", 0.0)
    assert np.array_equal(store._read(Path(store.get_image_uri(uid))).array, values)
    history = tmp_path / "data" / ".samloop" / "history" / "images"
    assert len(list(history.iterdir())) == 1


@pytest.mark.parametrize("while_it_runs", [True, False])
def test_what_was_fetched_can_be_removed_by_hand(pacs, tmp_path, while_it_runs):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)

    def remove(folder):
        shutil.rmtree(folder / "pacs")
        (folder / f"{uid}.nii").unlink()

    with application(pacs.url, tmp_path / "data") as client:
        affine = clicked(client, uid, [6, 6, 3], save_label=True)[2]
        accept(client, uid, 2 * BLOCK, affine, note="mine")
        (folder,) = (p.parent for p in (tmp_path / "data").rglob("journal.jsonl"))
        if while_it_runs:
            remove(folder.parent)
            assert downloaded(client.get("/datastore/image", params={"image": uid}))[0].shape == BLOCK.shape
            assert accept(client, uid, 3 * BLOCK, affine).json()["dicom_seg"]["state"] == "stored"
            assert np.array_equal(accepted(client, uid), 3 * BLOCK)
            return
    remove(folder.parent)
    with application(pacs.url, tmp_path / "data") as client:
        assert client.get("/datastore/").json()["completed"] == 1
        assert np.array_equal(accepted(client, uid), 2 * BLOCK)
        assert downloaded(client.get("/datastore/image", params={"image": uid}))[0].shape == BLOCK.shape
        assert client.get("/datastore/").json()["label_tags"] == {"final": 1, "original": 1}
        assert accepted_info(client, uid)["note"] == "mine"


def test_all_that_was_accepted_can_be_downloaded(pacs, tmp_path):
    (one, first), (two, second) = scan(tmp_path / "one"), scan(tmp_path / "two")
    content, _ = foreign(tmp_path / "two", 3 * BLOCK, {3: "aorta"})
    pacs.stow([*one, *two, content])
    with application(pacs.url, tmp_path / "data") as client:
        accept(client, first, BLOCK, clicked(client, first, [6, 6, 3])[2])
        reply = client.get("/datastore/dataset")
        with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
            names = set(archive.namelist())
        assert {f"image/{first}.nii", f"image/{second}.nii", f"label/{first}.nii"} < names
        assert f"label/{second}.nii.gz" in names


def test_images_are_the_pacss_alone(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    with application(pacs.url, tmp_path / "data") as client:
        image = client.get("/datastore/image", params={"image": uid})
        reply = client.put(
            "/datastore/image", params={"image": "new"}, files={"file": ("new.nii", image.content)}
        )
        assert reply.status_code == 409 and pacs.url in reply.json()["detail"]
        assert client.delete("/datastore/image", params={"id": uid}).status_code == 409
        assert pacs.uids() == [uid]
        assert client.get("/datastore/image", params={"image": "../../etc/passwd"}).status_code == 400
        assert client.get("/datastore/image", params={"image": "1.2.3"}).status_code == 404
        # an image of the client's own works as ever
        asked = {"foreground": [[6, 6, 3]], "label": "liver"}
        for where in ("session", "file"):
            files, params = {"file": ("own.nii", image.content)}, {}
            if where == "session":
                made = client.put("/session/", files={"files": ("own.nii", image.content)}).json()
                files, params = {}, {"session_id": made["session_id"]}
            reply = client.post(
                "/infer/sam_click_3d",
                params={**params, "output": "json"},
                data={"params": json.dumps(asked)},
                files=files or None,
            )
            assert reply.json()["label_names"] == {"liver": 1}, reply.text
            refused = client.post(
                "/infer/sam_click_3d",
                params={**params, "output": "dicom_seg"},
                data={"params": json.dumps(asked)},
                files=files or None,
            )
            assert refused.status_code == 400 and "DICOM series" in refused.json()["detail"]


@pytest.mark.real_data
def test_compressed_slices_are_fetched_as_they_are_stored(pacs, tmp_path):
    packed, plain = (
        repaired_abdomen(tmp_path / "packed", compressed=True),
        repaired_abdomen(tmp_path / "plain"),
    )
    pacs.stow(packed)
    pacs.stow(plain)
    store = pacs_store(pacs.url, tmp_path / "data")
    voxels = []
    for files in (packed, plain):
        uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
        voxels.append(store._read(Path(store.get_image_uri(uid))).array)
    assert voxels[0].shape == (512, 512, 20) and np.array_equal(*voxels)


def sorted_by(cases, uids):
    return [next(case for case in cases if uid in case["image"]) for uid in uids]
