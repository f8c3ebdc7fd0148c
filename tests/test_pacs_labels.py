"""Accepted labels in a real PACS, of this server and of others: which counts, and what is refused."""

import io
import time

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from tests.pacs_app import (
    BLOCK,
    LABELS,
    accept,
    accepted,
    accepted_info,
    application,
    clicked,
    foreign,
    pacs_store,
    scan,
    store,
    until,
)


def test_an_empty_label_map_is_one_too(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    nothing = np.zeros(BLOCK.shape, np.uint8)
    with application(pacs.url, tmp_path / "data") as client:
        affine = clicked(client, uid, [6, 6, 3])[2]
        assert accept(client, uid, nothing, affine).json()["dicom_seg"]["state"] == "stored"
        assert not accepted(client, uid).any()
    with application(pacs.url, tmp_path / "fresh") as client:
        assert client.get("/datastore/").json()["completed"] == 1
        assert not accepted(client, uid).any()


def test_a_segmentation_of_others_counts_by_the_names_of_its_segments(pacs, tmp_path, caplog):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    mask = np.where(BLOCK, 7, 0)
    mask[0, 0, 0] = 4
    mask[5, 6, 2] = 9
    content, seg = foreign(tmp_path / "scan", mask, {7: "Aorta ", 4: "lesion", 9: "spleen"})
    strange, _ = foreign(tmp_path / "scan", mask, {7: "a", 4: "b", 9: "c"}, date="20300101")
    pacs.stow([content, strange])
    with application(pacs.url, tmp_path / "data") as client:
        assert client.get("/datastore/").json()["completed"] == 1
        expected = np.where(mask == 7, LABELS["aorta"], 0) + np.where(mask == 9, LABELS["spleen"], 0)
        assert np.array_equal(accepted(client, uid), expected)
        assert np.array_equal(accepted(client, seg), expected)
        info = accepted_info(client, uid)
        assert info["unknown"] == ["lesion"] and info["dicom_seg"]["series"] == seg
        assert "lesion" in caplog.text
        kept = client.put(
            "/datastore/label/info", params={"label": uid, "tag": "final"}, data={"info": '{"seen": 1}'}
        )
        assert kept.status_code == 409
        assert client.delete("/datastore/label", params={"id": uid, "tag": "final"}).status_code == 409


def test_the_newest_label_counts_and_what_was_seen_on_accepting_never_does(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    old, _ = foreign(tmp_path / "scan", BLOCK, {1: "liver"}, date="20200101")
    ahead, _ = foreign(tmp_path / "scan", 2 * BLOCK, {2: "spleen"}, date="20900101")
    pacs.stow([*files, old])
    with application(pacs.url, tmp_path / "data") as client:
        assert np.array_equal(accepted(client, uid), BLOCK * 1)
        pacs.stow([ahead])
        until_label(client, uid, BLOCK * 2)
        affine = clicked(client, uid, [6, 6, 3])[2]
        own = accept(client, uid, 3 * BLOCK, affine).json()["dicom_seg"]["series"]
        assert np.array_equal(accepted(client, uid), BLOCK * 3)
        later, newest = foreign(tmp_path / "scan", BLOCK, {1: "liver"}, date="20910101")
        before, _ = foreign(tmp_path / "scan", 2 * BLOCK, {2: "spleen"}, date="20190101")
        pacs.stow([before])
        pacs.stow([later])
        until_label(client, uid, BLOCK * 1)
        assert accepted_info(client, uid)["dicom_seg"]["series"] == newest
        assert np.array_equal(accepted(client, own), BLOCK * 3)
        assert client.get("/datastore/").json()["completed"] == 1
        pacs.delete(newest)
        until_label(client, uid, BLOCK * 3)


def test_a_segmentation_deleted_in_the_pacs_counts_no_more(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    with application(pacs.url, tmp_path / "data") as client:
        affine = clicked(client, uid, [6, 6, 3])[2]
        seg = accept(client, uid, BLOCK, affine).json()["dicom_seg"]["series"]
        refused = client.delete("/datastore/label", params={"id": uid, "tag": "final"})
        assert refused.status_code == 409 and seg in refused.json()["detail"]
        pacs.delete(seg)
        until(client, 0, "completed")
        assert client.get("/datastore/label", params={"label": uid, "tag": "final"}).status_code == 404
        assert client.post("/activelearning/first", json={}).json()["id"] == uid
        versions = client.get("/datastore/label/history", params={"image": uid, "tag": "final"})
        assert versions.status_code == 200 and "saved" in versions.text
        assert client.delete("/datastore/label", params={"id": uid, "tag": "final"}).status_code == 200


def test_what_the_server_notes_itself_is_not_overwritten(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    with application(pacs.url, tmp_path / "data") as client:
        accept(client, uid, BLOCK, clicked(client, uid, [6, 6, 3])[2], pacs={"series": "1.2"}, note="mine")
        for path, params in (("image", {"image": uid}), ("label", {"label": uid, "tag": "final"})):
            place = f"/datastore/{path}/info"
            refused = client.put(place, params=params, data={"info": '{"pacs": {"series": "1.2"}}'})
            assert refused.status_code == 400
            assert client.put(place, params=params, data={"info": '{"seen": true}'}).status_code == 200
            assert client.get(place, params=params).json()["seen"] is True
        info = accepted_info(client, uid)
        assert info["note"] == "mine" and "pacs" not in info
        assert info["dicom_seg"]["series"] == pacs.uids(Modality="SEG")[0]


def test_a_damaged_segmentation_is_left_out_of_the_training(pacs, tmp_path, caplog):
    (one, first), (two, second) = scan(tmp_path / "one"), scan(tmp_path / "two")
    good, _ = foreign(tmp_path / "one", BLOCK, {1: "liver"})
    bad, broken = foreign(tmp_path / "two", BLOCK, {1: "liver"})
    data = pydicom.dcmread(io.BytesIO(bad))
    data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence = [Dataset()]
    buffer = io.BytesIO()
    data.save_as(buffer, write_like_original=False)
    pacs.stow([*one, *two, good, buffer.getvalue()])
    store = pacs_store(pacs.url, tmp_path / "data")
    assert set(store.get_labeled_images()) == {first, second}
    assert [case["image"].rpartition("/")[2] for case in store.datalist()] == [f"{first}.nii"]
    assert broken in caplog.text
    assert store.get_unlabeled_images() == [second]


def until_label(client, uid, expected):
    for _ in range(100):
        if np.array_equal(accepted(client, uid), expected):
            return
        time.sleep(0.1)
    pytest.fail("another label counts")


def test_a_segment_that_the_project_does_not_know_hides_none_that_it_knows(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    mask = np.where(BLOCK, 1, 0)
    mask[0, 0] = 2
    content, _ = foreign(tmp_path / "scan", mask, {1: "liver", 2: "body"})
    data = pydicom.dcmread(io.BytesIO(content))
    of_liver, size = BLOCK.any(axis=(0, 1)).sum(), data.Rows * data.Columns // 8
    drawn = data.PixelData[: of_liver * size] + b"\xff" * (data.NumberOfFrames - of_liver) * size
    data.PixelData = drawn  # the body is everywhere
    buffer = io.BytesIO()
    data.save_as(buffer, write_like_original=False)
    pacs.stow([*files, buffer.getvalue()])
    with application(pacs.url, tmp_path / "data") as client:
        assert np.array_equal(accepted(client, uid), BLOCK)
        assert accepted_info(client, uid)["unknown"] == ["body"]


def test_a_label_whose_saver_was_killed_before_it_was_sent_is_sent_at_the_next_start(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    with application(pacs.url, tmp_path / "data") as client:
        affine = clicked(client, uid, [6, 6, 3])[2]
        folder = store()._root
    nib.save(nib.Nifti1Image(np.where(BLOCK, 2, 0).astype(np.uint8), affine), tmp_path / "label.nii")
    killed = pacs_store(pacs.url, folder)  # it does not serve, and so sends nothing
    killed.save_label(uid, str(tmp_path / "label.nii"), "final", {})
    assert killed.status()["waiting"] == 1 and killed.get_labeled_images() == [uid]
    for left in (folder / "outbox").glob("[!.]*"):
        left.unlink()
    with application(pacs.url, tmp_path / "data") as client:
        until(client, [1, 0], "completed", "waiting")
        assert len(pacs.uids(Modality="SEG")) == 1
        assert accepted_info(client, uid)["dicom_seg"]["state"] == "stored"
        assert np.array_equal(accepted(client, uid), 2 * BLOCK)
