"""Downloads of images and labels: resumed, not repeated, and whole whatever becomes of the file."""

import threading

import nibabel as nib
import numpy as np
import pytest

SHAPE = (24, 20, 6)


def label_file(value):
    return nib.Nifti1Image(np.full(SHAPE, value, np.uint8), np.diag([1, 1, 2, 1])).to_bytes()


def save(client, value, kind=".nii"):
    return client.put("/datastore/label?image=ct", files={"label": (f"l{kind}", label_file(value))})


@pytest.fixture(params=["image", "label"])
def where(request, served):
    client, studies, _ = served
    save(client, 1)
    paths = {"image": "/datastore/image?image=ct", "label": "/datastore/label?label=ct&tag=final"}
    files = {"image": studies / "ct.nii.gz", "label": studies / "labels" / "final" / "ct.nii"}
    return client, paths[request.param], files[request.param].read_bytes()


def test_a_download_that_was_cut_off_goes_on_where_it_was(where):
    client, path, content = where
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(content)
    assert head.headers["accept-ranges"] == "bytes"
    etag = head.headers["etag"]
    first = client.get(path, headers={"range": "bytes=0-99"})
    rest = client.get(path, headers={"range": "bytes=100-", "if-range": etag})
    assert (first.status_code, rest.status_code) == (206, 206)
    assert first.content + rest.content == content
    assert rest.headers["content-range"] == f"bytes 100-{len(content) - 1}/{len(content)}"
    assert client.get(path, headers={"range": "bytes=-5"}).content == content[-5:]
    beyond = client.get(path, headers={"range": f"bytes={len(content)}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert client.get(path, headers={"range": "bytes=x"}).status_code == 400
    assert client.get(path, headers={"range": "bytes=0-9", "if-range": '"old"'}).content == content


def test_what_the_client_has_is_not_sent_again(where):
    client, path, content = where
    etag = client.get(path).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        reply = client.get(path, headers={"if-none-match": known})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"if-none-match": '"other"'}).content == content


def test_a_new_version_has_another_etag(served):
    client, _, _ = served
    path = "/datastore/label?label=ct&tag=final"
    seen = set()
    for value in (1, 2, 3):
        save(client, value)
        seen.add(client.head(path).headers["etag"])
    assert len(seen) == 3
    resumed = client.get(path, headers={"range": "bytes=10-", "if-range": min(seen)})
    assert resumed.content in (label_file(3), label_file(3)[10:])


def test_heads_name_the_label_as_stock_does_too(served):
    client, _, _ = served
    save(client, 1)
    for query in ("image=ct", "label=ct"):
        assert client.head(f"/datastore/label?{query}&tag=final").status_code == 200
        assert client.head(f"/datastore/label?{query}&tag=none").status_code == 404
    assert client.head("/datastore/label?tag=final").status_code == 400
    assert client.head("/datastore/image?image=none").status_code == 404


def test_a_label_is_downloaded_whole_while_it_is_replaced(served):
    """By files of two extensions in turn, so that the one of before is gone each time."""
    client, _, _ = served
    save(client, 1)
    stop, wrong, got = threading.Event(), [], 0
    known = {1: label_file(1), 2: label_file(2)}

    def replace():
        n = 0
        while not stop.is_set():
            n += 1
            save(client, 1 + n % 2, (".nii", ".nii.gz")[n % 2 if n % 3 else 0])

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(60):
            reply = client.get("/datastore/label?label=ct&tag=final")
            whole = reply.status_code == 200 and len(reply.content) == int(reply.headers["content-length"])
            if not whole or reply.content not in known.values():
                wrong.append((reply.status_code, reply.content[:80]))
            got += 1
    finally:
        stop.set()
        writer.join(60)
    assert (wrong, got) == ([], 60)


def test_versions_over_rest(served):
    """Listed, downloaded, put back; a wrong or unknown one says what to do."""
    client, _, _ = served
    photo = np.ones((30, 18), np.uint8)
    for value in (1, 2):
        content = nib.Nifti1Image(photo * value, np.eye(4)).to_bytes()
        reply = client.put(
            "/datastore/label?image=photo",
            files={"label": ("l.nii", content)},
            data={"params": '{"client_id": "slicer", "model": "sam_click_2d"}'},
        )
        assert reply.status_code == 200, reply.text
    told = client.get("/datastore/label/history?image=photo&tag=final").json()
    assert told["image"] == "photo"
    first, second = told["versions"]
    assert (first["who"], first["model"], first["event"]) == ("slicer", "sam_click_2d", "saved")
    assert (first["available"], first["current"], second["current"]) == (True, False, True)
    old = client.get(f"/datastore/label/version?image=photo&sha256={first['sha256']}")
    assert old.status_code == 200 and len(old.content) == first["size"]
    assert nib.Nifti1Image.from_bytes(old.content).get_fdata().max() == 1
    assert client.get("/datastore/label/version?image=photo&sha256=" + "0" * 64).status_code == 404
    restored = client.put(
        f"/datastore/label/restore?image=photo&sha256={first['sha256']}",
        data={"params": '{"client_id": "chief"}'},
    )
    assert restored.json() == {"image": "photo", "label": "photo"}
    now = client.get("/datastore/label?label=photo&tag=final")
    assert now.content == old.content
    last = client.get("/datastore/label/history?image=photo").json()["versions"][-1]
    assert (last["restored"], last["who"]) == (first["sha256"], "chief")
    plain = client.put(f"/datastore/label/restore?image=photo&sha256={second['sha256']}")
    assert plain.status_code == 200
    assert client.get("/datastore/label/history?image=photo&tag=none").json()["versions"] == []


def test_the_reviewers_requests_are_noted_and_journaled(served):
    """3D Slicer's reviewer, by both of MONAI Label's routes."""
    client, _, _ = served
    save(client, 1)
    old = client.put(
        "/datastore/updatelabelinfo?label=ct&tag=final", data={"params": '{"status": "flagged"}'}
    )
    new = client.put("/datastore/label/info?label=ct&tag=final", data={"info": '{"status": "approved"}'})
    assert (old.status_code, new.status_code) == (200, 200)
    assert client.get("/datastore/label/info?label=ct&tag=final").json()["status"] == "approved"
    told = client.get("/datastore/label/history?image=ct&tag=final").json()["versions"]
    assert [v["info"]["status"] for v in told if v["event"] == "info"][-2:] == ["flagged", "approved"]
    missing = client.put("/datastore/updatelabelinfo?label=ct&tag=none", data={"params": "{}"})
    assert missing.status_code == 404


def test_lists_are_as_stock_gives_them(served):
    client, studies, _ = served
    save(client, 1)
    assert client.get("/datastore/").json()["total"] == len(
        client.get("/datastore/?output=all").json()["objects"]
    )
    cases = client.get("/datastore/?output=train").json()
    assert {"image": str(studies / "ct.nii.gz"), "label": str(studies / "labels/final/ct.nii")} in cases
    entry = client.get("/datastore/?output=all").json()["objects"]["ct"]
    assert entry["image"]["ext"] == ".nii.gz" and entry["labels"]["final"]["ext"] == ".nii"
    assert client.get("/datastore/?output=odd").status_code == 422


def test_a_full_disk_is_told(served, monkeypatch):
    import errno
    import os

    client, _, _ = served
    save(client, 1)
    before = client.get("/datastore/label?label=ct&tag=final").content

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = save(client, 2)
    assert reply.status_code == 507
    assert "label final of ct was not saved (No space left on device)" in reply.json()["detail"]
    assert client.get("/datastore/label?label=ct&tag=final").content == before
    assert save(client, 2).status_code == 200
