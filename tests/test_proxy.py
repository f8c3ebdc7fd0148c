"""OHIF's way to the PACS: what passes, what stays, and that nothing else is reached."""

import time
import uuid

import numpy as np
import pydicom
import pytest

from apps.samloop.pacs.multipart import multipart_body
from tests.dicom_data import write_series
from tests.orthanc import running_orthanc
from tests.pacs_app import application
from tests.pacs_gate import gate_before

#: Seconds in which a PACS that is down must be told of, and what a busy machine may add.
SOON, SLACK = 2.0, 2.0
USER, PASSWORD = "viewer", "pass:word/1"


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    """Orthanc with a password, the gate before it, a client of the application, and the files of a series."""
    folder = tmp_path_factory.mktemp("proxy")
    with running_orthanc(folder / "orthanc", {USER: PASSWORD}) as orthanc, gate_before(orthanc.url) as gate:
        files = write_series(folder / "scan", np.arange(24 * 20 * 6).reshape(24, 20, 6).astype(np.int16))
        orthanc.stow(files)
        own = {"DICOMWEB_USERNAME": USER, "DICOMWEB_PASSWORD": PASSWORD}
        with application(gate.url, folder / "data", **own) as client:
            yield orthanc, gate, client, files


def place(file):
    """Where a file lies in the PACS: below studies."""
    data = pydicom.dcmread(file, stop_before_pixels=True)
    return f"studies/{data.StudyInstanceUID}/series/{data.SeriesInstanceUID}/instances/{data.SOPInstanceUID}"


@pytest.mark.parametrize("service", ["qido/", "wado/", ""])
def test_a_search_is_answered_as_it_was_asked(proxied, service):
    _, gate, client, _ = proxied
    found = client.get(f"/proxy/dicom/{service}studies?PatientID=TEST&includefield=00081030&limit=5")
    assert found.status_code == 200 and len(found.json()) == 1
    assert found.headers["content-type"].startswith("application/dicom+json")
    assert gate.asked[-1][1] == "/dicom-web/studies?PatientID=TEST&includefield=00081030&limit=5"
    nobody = client.get(f"/proxy/dicom/{service}studies", params={"PatientID": "NO ONE*&x"})
    assert nobody.json() == []


def test_headers_and_frames_are_passed_with_what_was_accepted(proxied):
    _, gate, client, files = proxied
    series = place(files[0]).partition("/instances")[0]
    headers = client.get(f"/proxy/dicom/wado/{series}/metadata", headers={"Accept": "application/dicom+json"})
    assert len(headers.json()) == 6
    accept = "multipart/related; type=application/octet-stream; transfer-syntax=*"
    frame = client.get(f"/proxy/dicom/wado/{place(files[2])}/frames/1", headers={"Accept": accept})
    assert frame.status_code == 200 and frame.headers["content-type"].startswith("multipart/related")
    assert gate.asked[-1][2]["accept"] == accept
    assert pydicom.dcmread(files[2]).PixelData in frame.content
    missing = client.get(f"/proxy/dicom/wado/{series}9/metadata")
    assert missing.status_code == 404


def test_who_asks_stays_here_and_who_this_server_is_stays_there(proxied):
    _, gate, client, _ = proxied
    sent = {
        "Authorization": "Bearer of-the-client",
        "Cookie": "session=of-the-client",
        "X-Forwarded-For": "10.0.0.1",
        "Proxy-Authorization": "Basic b2YtdGhlLWNsaWVudA==",
        "Connection": "keep-alive, X-Mine",
        "X-Mine": "of-the-client",
    }
    reply = client.get("/proxy/dicom/qido/studies", headers=sent)
    assert reply.status_code == 200
    asked = gate.asked[-1][2]
    assert "of-the-client" not in str(asked) and "10.0.0.1" not in str(asked)
    assert asked["authorization"].startswith("Basic ")
    assert PASSWORD not in str(reply.headers) + reply.text
    assert not {"set-cookie", "www-authenticate", "connection", "keep-alive", "server"} & set(reply.headers)


def test_a_pacs_that_does_not_know_this_server_asks_the_browser_for_nothing(proxied, tmp_path):
    orthanc, *_ = proxied
    with application(orthanc.url, tmp_path) as client:
        reply = client.get("/proxy/dicom/qido/studies")
        assert reply.status_code == 503 and "www-authenticate" not in reply.headers
        assert "MONAI_LABEL_DICOMWEB_USERNAME" in reply.json()["detail"]
    with application(
        orthanc.url.replace("//", f"//{USER}:{PASSWORD.replace('/', '%2F')}@"), tmp_path
    ) as client:
        assert client.get("/proxy/dicom/qido/studies").status_code == 200
        shown = client.get("/datastore/?output=all").text + client.get("/").text + client.get("/info/").text
        assert PASSWORD not in shown and "pass:word%2F1" not in shown


@pytest.mark.parametrize(
    "path",
    [
        "wado/../system",
        "wado/%2e%2e/system",
        "wado/studies/%2e%2e/%2e%2e/system",
        "wado/studies%2f..%2f..%2fsystem",
        "wado/studies/..%5c..%5csystem",
        "wado/%252e%252e/system",
        "wado//system",
        "wado/http://127.0.0.1/system",
        "wado/@127.0.0.1/system",
        "servers",
        "qido/servers",
        "qido",
        "",
        "wado/studies/1.2%00/series",
        "wado/studies/1.2%3Fx=1",
        "wado/studies/1.2%23x",
    ],
)
def test_nothing_but_dicomweb_is_reached(proxied, path):
    _, gate, client, _ = proxied
    before = len(gate.asked)
    reply = client.get(f"/proxy/dicom/{path}")
    assert reply.status_code in (400, 404), reply.text
    assert not [asked for asked in gate.asked[before:] if "series?" not in asked[1]]


def test_files_are_stored_and_nothing_else_is_posted(proxied):
    orthanc, gate, client, files = proxied
    other = pydicom.dcmread(files[0])
    uids = set(orthanc.uids())
    for service in ("stow", "wado"):  # OHIF stores where it fetches
        other.SeriesInstanceUID = pydicom.uid.generate_uid()
        other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        other.save_as(files[0].with_name("other.dcm"), write_like_original=False)
        content = files[0].with_name("other.dcm").read_bytes()
        body, kind = multipart_body(content, uuid.uuid4().hex)
        headers = {"Content-Type": kind, "Accept": "application/dicom+json"}
        reply = client.post(f"/proxy/dicom/{service}/studies", content=body, headers=headers)
        assert reply.status_code == 200 and "00081199" in reply.json()
        assert gate.asked[-1][:2] == ("POST", "/dicom-web/studies")
        uids.add(str(other.SeriesInstanceUID))
    assert set(orthanc.uids()) == uids
    for path, kind in (
        ("qido/studies", "application/json"),
        ("wado/studies/1.2/series", "multipart/related"),
        ("servers/x/stow", "multipart/related"),
    ):
        reply = client.post(f"/proxy/dicom/{path}", content=b"{}", headers={"Content-Type": kind})
        assert reply.status_code in (404, 405), reply.text
    for method in ("PUT", "DELETE", "PATCH"):
        assert client.request(method, f"/proxy/dicom/wado/{place(files[0])}").status_code == 405
    assert set(orthanc.uids()) == uids


def test_a_body_that_breaks_off_does_not_look_whole(proxied):
    _, gate, client, files = proxied
    with gate.saying("cut"):
        reply = client.get(f"/proxy/dicom/wado/{place(files[0])}")
        assert len(reply.content) < int(reply.headers["content-length"])


def test_a_silent_pacs_keeps_nobody_else_waiting(proxied):
    _, gate, client, files = proxied
    from concurrent.futures import ThreadPoolExecutor

    with gate.saying("silent"), ThreadPoolExecutor(60) as pool:
        start = time.monotonic()
        frames = [pool.submit(client.get, f"/proxy/dicom/wado/{place(files[0])}/frames/1") for _ in range(60)]
        assert client.get("/datastore/image/info", params={"image": "no-uid"}).status_code == 404
        assert not any(frame.done() for frame in frames)  # which that did not wait for
        assert {frame.result().status_code for frame in frames} == {503}
        assert time.monotonic() - start < SOON + SLACK
    deadline = time.monotonic() + 30
    while client.get("/proxy/dicom/qido/studies").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_local_studies_have_no_pacs(served):
    client, *_ = served
    assert client.get("/proxy/dicom/qido/studies").status_code == 404
