"""Studies in a real PACS: what is listed, fetched and accepted, and what a fresh machine finds again."""

import io
import json
import time

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from sam_infer.dicom.seg import write_seg
from sam_infer.dicom.series import read_series
from tests.dicom_data import repaired_abdomen, write_series
from tests.orthanc import orthanc  # noqa: F401 - a fixture
from tests.pacs_app import LABELS, accept, application, clicked, downloaded, pacs_store, until

BLOCK = np.zeros((24, 20, 6), bool)
BLOCK[4:10, 5:9, 1:5] = True


@pytest.fixture
def pacs(orthanc):  # noqa: F811
    """An empty PACS."""
    for uid in orthanc.uids():
        orthanc.delete(uid)
    return orthanc


def scan(folder, values=None, **options):
    """Files of a volume with a bright block, and its SeriesInstanceUID."""
    values = np.where(BLOCK, 200, -1000) if values is None else values
    files = write_series(folder, values.astype(np.int16), **options)
    return files, str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)


def foreign(folder, labelmap, names, *, date="20200101", creator="somebody"):
    """A DICOM SEG of the series in a folder, as another program would store it; and its SeriesInstanceUID."""
    content = write_seg(
        np.asfortranarray(labelmap, np.uint8),
        read_series(folder),
        names=names,
        description="elsewhere",
        creator=creator,
        algorithm=None,
    )
    data = pydicom.dcmread(io.BytesIO(content))
    data.ContentDate, data.ContentTime = date, "120000"
    buffer = io.BytesIO()
    data.save_as(buffer, write_like_original=False)
    return buffer.getvalue(), str(data.SeriesInstanceUID)


def label(client, uid):
    return downloaded(client.get("/datastore/label", params={"label": uid, "tag": "final"}))[0]


def final_info(client, uid):
    return client.get("/datastore/label/info", params={"label": uid, "tag": "final"}).json()


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
            assert np.array_equal(label(client, name), BLOCK * LABELS["spleen"])
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
            assert np.array_equal(label(client, uid), mask)
            info = final_info(client, uid)
            assert info["dicom_seg"]["state"] == "stored" and info["unknown"] == []
            assert listed[uid]["labels"]["final"]["info"]["dicom_seg"] == info["dicom_seg"]
    store = pacs_store(pacs.url, tmp_path / "third")  # as a training's own process begins
    assert len(store.datalist()) == 2 and store.get_unlabeled_images() == []


def sorted_by(cases, uids):
    return [next(case for case in cases if uid in case["image"]) for uid in uids]


def test_an_empty_label_map_is_one_too(pacs, tmp_path):
    files, uid = scan(tmp_path / "scan")
    pacs.stow(files)
    nothing = np.zeros(BLOCK.shape, np.uint8)
    with application(pacs.url, tmp_path / "data") as client:
        affine = clicked(client, uid, [6, 6, 3])[2]
        assert accept(client, uid, nothing, affine).json()["dicom_seg"]["state"] == "stored"
        assert not label(client, uid).any()
    with application(pacs.url, tmp_path / "fresh") as client:
        assert client.get("/datastore/").json()["completed"] == 1
        assert not label(client, uid).any()


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
        assert np.array_equal(label(client, uid), expected)
        assert np.array_equal(label(client, seg), expected)
        info = final_info(client, uid)
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
        assert np.array_equal(label(client, uid), BLOCK * 1)
        pacs.stow([ahead])
        until_label(client, uid, BLOCK * 2)
        affine = clicked(client, uid, [6, 6, 3])[2]
        own = accept(client, uid, 3 * BLOCK, affine).json()["dicom_seg"]["series"]
        assert np.array_equal(label(client, uid), BLOCK * 3)
        later, newest = foreign(tmp_path / "scan", BLOCK, {1: "liver"}, date="20910101")
        before, _ = foreign(tmp_path / "scan", 2 * BLOCK, {2: "spleen"}, date="20190101")
        pacs.stow([before])
        pacs.stow([later])
        until_label(client, uid, BLOCK * 1)
        assert final_info(client, uid)["dicom_seg"]["series"] == newest
        assert np.array_equal(label(client, own), BLOCK * 3)
        assert client.get("/datastore/").json()["completed"] == 1
        pacs.delete(newest)
        until_label(client, uid, BLOCK * 3)


def until_label(client, uid, expected):
    for _ in range(100):
        if np.array_equal(label(client, uid), expected):
            return
        time.sleep(0.1)
    pytest.fail("another label counts")


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
        assert "other instances" in info["changed"]
        assert "original" not in client.get("/datastore/?output=all").json()["objects"][second]["labels"]
        assert np.array_equal(label(client, first), BLOCK[:, :, :4])


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
        voxels.append(store._read(store.get_image_uri(uid)).array)
    assert voxels[0].shape == (512, 512, 20) and np.array_equal(*voxels)


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
