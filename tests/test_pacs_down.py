"""A PACS that is shut, silent, broken, or back: what is answered, how soon, and what becomes of labels."""

import io
import time

import numpy as np
import pydicom
import pytest

from tests.orthanc import running_orthanc
from tests.pacs_app import (
    BLOCK,
    accept,
    accepted,
    application,
    clicked,
    downloaded,
    foreign,
    scan,
    store,
    until,
)
from tests.pacs_gate import gate_before

pytestmark = pytest.mark.slow
#: Seconds in which whatever needs the PACS must be answered, and what a busy machine may add.
SOON, SLACK = 2.0, 1.5


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    """Orthanc, gate, client of the application; uid of a series that is fetched, and of one that is not."""
    folder = tmp_path_factory.mktemp("down")
    with running_orthanc(folder / "orthanc") as orthanc, gate_before(orthanc.url) as gate:
        there, one = scan(folder / "one")
        orthanc.stow(there)
        orthanc.stow(scan(folder / "two")[0])
        (other,) = set(orthanc.uids()) - {one}
        with application(gate.url, folder / "data") as client:
            clicked(client, one, [6, 6, 3])
            foreign(folder / "one", BLOCK, {1: "liver"})  # the first one loads what writes it
            yield orthanc, gate, client, one, other


def timed(ask):
    """The reply to a request, which must come soon."""
    start = time.monotonic()
    reply = ask()
    took = time.monotonic() - start
    assert took < SOON + SLACK, f"answered after {took:.2f} s"
    return reply


@pytest.mark.parametrize("mode", ["shut", "silent", "html", "500"])
def test_what_needs_the_pacs_is_refused_soon_and_what_is_here_goes_on(pacs, mode):
    _, gate, client, one, other = pacs
    until(client, [2, None], "total", "unavailable")
    with gate.saying(mode):
        found = {}
        while "unavailable" not in found:  # the list is asked for again after two seconds
            info = timed(lambda: client.get("/info/"))
            assert info.status_code == 200
            found = info.json()["datastore"]
            assert found["total"] == 2
        assert gate.url in found["unavailable"]
        for ask in (
            lambda: client.get("/datastore/image", params={"image": other}),
            lambda: client.post("/infer/sam_click_3d", params={"image": other}, data={"params": "{}"}),
            lambda: client.put("/datastore/label", params={"image": other}, files={"label": ("a.nii", b"x")}),
            lambda: client.get("/datastore/image", params={"image": "1.2.3.4"}),
            lambda: client.get("/proxy/dicom/qido/studies"),
        ):
            reply = timed(ask)
            assert reply.status_code == 503, reply.text
            assert gate.url in reply.json()["detail"] and reply.headers["retry-after"]
        assert timed(lambda: client.get("/datastore/")).json()["total"] == 2
        listed = timed(lambda: client.get("/datastore/", params={"output": "all"})).json()
        assert set(listed["objects"]) == {one, other} and listed["unavailable"]
        assert (clicked(client, one, [6, 6, 3])[1] > 0).sum() == BLOCK.sum()
        assert not store().state()["reachable"]
    until(client, [2, None], "total", "unavailable")
    assert store().state()["reachable"]
    assert client.get("/datastore/image/info", params={"image": other}).json()["Modality"] == "CT"


def test_an_answer_that_breaks_off_is_no_image(pacs):
    _, gate, client, _, other = pacs
    until(client, [2, None], "total", "unavailable")
    with gate.saying("cut"):
        reply = client.get("/datastore/image", params={"image": other})
        assert reply.status_code == 503, reply.text
        assert not list(store()._series_files._folder.glob(f"*{other}*/*"))
    until(client, None, "unavailable")
    voxels, _ = downloaded(client.get("/datastore/image", params={"image": other}))
    assert np.array_equal(voxels > 0, BLOCK)


@pytest.mark.parametrize("mode", ["shut", "silent"])
def test_a_label_accepted_meanwhile_is_sent_by_itself(pacs, mode):
    orthanc, gate, client, one, _ = pacs
    until(client, None, "unavailable")
    affine = clicked(client, one, [6, 6, 3])[2]
    before = set(orthanc.uids(Modality="SEG"))
    with gate.saying(mode):
        reply = timed(lambda: accept(client, one, 2 * BLOCK, affine))
        assert reply.status_code == 200, reply.text
        sent = reply.json()["dicom_seg"]
        assert sent["state"] == "waiting" and sent["series"] is None and sent["reason"]
        found = client.get("/datastore/").json()
        assert found["waiting"] == 1 and found["completed"] == 1
        assert np.array_equal(accepted(client, one), 2 * BLOCK)
        # a second one takes its place
        again = timed(lambda: accept(client, one, 3 * BLOCK, affine)).json()["dicom_seg"]
        assert again["state"] == "waiting" and client.get("/datastore/").json()["waiting"] == 1
        assert set(orthanc.uids(Modality="SEG")) == before
    until(client, [0, 1], "waiting", "completed")
    (new,) = set(orthanc.uids(Modality="SEG")) - before
    assert pydicom.dcmread(io.BytesIO(orthanc.file(new))).SegmentSequence[0].SegmentLabel == "aorta"
    told = client.get("/datastore/label/info", params={"label": one, "tag": "final"}).json()
    assert told["dicom_seg"] == {"state": "stored", "series": new, "reason": None}
    assert np.array_equal(accepted(client, one), 3 * BLOCK)
    assert np.array_equal(accepted(client, new), 3 * BLOCK)


def test_the_server_starts_without_the_pacs_and_with_what_waits(tmp_path):
    with running_orthanc(tmp_path / "orthanc") as orthanc, gate_before(orthanc.url) as gate:
        files, uid = scan(tmp_path / "one")
        orthanc.stow(files)
        with application(gate.url, tmp_path / "data") as client:
            affine = clicked(client, uid, [6, 6, 3])[2]
            gate.stop()
            assert accept(client, uid, BLOCK, affine).json()["dicom_seg"]["state"] == "waiting"
        with application(gate.url, tmp_path / "data") as client:
            found = client.get("/datastore/").json()
            assert (found["total"], found["completed"], found["waiting"]) == (1, 1, 1)
            assert gate.url in found["unavailable"]
            assert np.array_equal(accepted(client, uid), BLOCK)
            assert orthanc.uids(Modality="SEG") == []
            gate.start()
            until(client, 0, "waiting")
            assert len(orthanc.uids(Modality="SEG")) == 1
        with application(gate.url, tmp_path / "other") as client:
            assert np.array_equal(accepted(client, uid), BLOCK)


def test_a_pacs_that_never_answered_is_told_of(tmp_path):
    with running_orthanc(tmp_path / "orthanc") as orthanc, gate_before(orthanc.url) as gate:
        files, uid = scan(tmp_path / "one")
        orthanc.stow(files)
        gate.stop()
        with application(gate.url, tmp_path / "data") as client:
            assert gate.url in client.get("/info/").json()["datastore"]["unavailable"]
            for reply in (
                timed(lambda: client.get("/datastore/", params={"output": "all"})),
                timed(lambda: client.post("/activelearning/first", json={})),
                timed(lambda: client.get("/datastore/image", params={"image": uid})),
            ):
                assert reply.status_code == 503 and gate.url in reply.json()["detail"]
            gate.start()
            until(client, [1, None], "total", "unavailable")
            assert client.post("/activelearning/first", json={}).json()["id"] == uid
