"""Batches: resumed, told case by case, never stopped by one case; and the routes that start them."""

import json
import os
import time

import nibabel as nib
import numpy as np
import pytest

from apps.samloop.batch import AGAIN, Case, Job, read_report, run_batch
from sam_infer.errors import InputError
from tests.unets import constant_unet

LABELS = {"liver": 1, "spleen": 2, "aorta": 3}


class Bench:
    """Three files, and a model that writes down which ones it saw."""

    def __init__(self, folder):
        self.folder, self.report = folder, folder / "out" / "report.json"
        self.seen, self.results, self.broken, self.stop_at = [], set(), set(), None
        self.told = []
        for name in "abc":
            (folder / f"{name}.nii").write_text(name)

    def work(self, case, path, mark):
        if case.name == self.stop_at:
            raise KeyboardInterrupt
        if case.name in self.broken:
            raise InputError("image", case.name, "cannot be read")
        self.seen.append(case.name)
        self.results.add(case.name)
        return {"label_names": {"liver": 1}, "score": 0.5, "latencies": {}}

    def run(self, names="abc", *, fingerprint="f1", restart=False, **settings):
        self.seen, self.told = [], []
        cases = [
            Case(name=n, find=lambda n=n: self.folder / f"{n}.nii", kept=lambda _, n=n: n in self.results)
            for n in names
        ]
        job = Job(model="unet", fingerprint=fingerprint, settings=settings)
        return run_batch(cases, job, self.work, report=self.report, restart=restart, tell=self.told.append)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def statuses(report):
    return {name: entry["status"] for name, entry in report["cases"].items()}


def test_a_case_that_fails_is_told_and_the_others_are_done(bench):
    bench.broken = {"b"}
    report = bench.run()
    assert statuses(report) == {"a": "done", "b": "failed", "c": "done"}
    assert report["cases"]["b"]["reason"] == "image = 'b': cannot be read"
    assert report["cases"]["a"]["label_names"] == {"liver": 1}
    assert report["cases"]["a"]["score"] == 0.5
    assert (report["total"], report["done"], report["failed"], report["left"]) == (3, 2, 1, 0)
    assert report["ended"] >= report["started"]
    assert report == json.loads(bench.report.read_text())
    bench.broken = set()
    assert statuses(bench.run()) == {"a": "skipped", "b": "done", "c": "skipped"}, (
        "what failed is tried again"
    )


def test_progress_is_told_after_every_case(bench):
    bench.run()
    assert [(now["left"], now["done"], now["ended"]) for now in bench.told] == [
        (3, 0, None),
        (2, 1, None),
        (1, 2, None),
        (0, 3, None),
    ]
    assert bench.told[0]["seconds_left"] is None, "nothing is known before the first case"
    assert all(now["seconds_left"] is not None for now in bench.told[1:])


def test_a_killed_batch_goes_on_where_it_was(bench):
    bench.stop_at = "c"
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    left = read_report(bench.report)
    assert statuses(left) == {"a": "done", "b": "done"}
    assert left["ended"] is None
    bench.stop_at = None
    report = bench.run()
    assert bench.seen == ["c"]
    assert statuses(report) == {"a": "skipped", "b": "skipped", "c": "done"}
    assert report["cases"]["a"]["reason"] == AGAIN
    assert report["cases"]["a"]["score"] == 0.5


@pytest.mark.parametrize("change", ["file", "fingerprint", "settings", "result", "restart", "nothing"])
def test_what_is_done_again(bench, change):
    bench.run(tag="original")
    options = {"tag": "original"}
    if change == "file":
        os.utime(bench.folder / "b.nii", ns=(1, 1))
    elif change == "result":
        bench.results.remove("b")
    elif change != "nothing":
        new = {"fingerprint": "f2", "settings": "mine", "restart": True}[change]
        options["tag" if change == "settings" else change] = new
    bench.run(**options)
    expected = {"file": ["b"], "result": ["b"], "nothing": []}
    assert bench.seen == expected.get(change, ["a", "b", "c"])


def test_what_other_batches_did_is_not_forgotten(bench):
    bench.run()
    assert set(bench.run("a")["earlier"]) == {"b", "c"}
    bench.run()
    assert bench.seen == []


def test_a_missing_file_and_a_damaged_report_are_borne(bench):
    bench.run()
    (bench.folder / "b.nii").unlink()
    report = bench.run()
    assert statuses(report) == {"a": "skipped", "b": "failed", "c": "skipped"}
    assert "FileNotFoundError" in report["cases"]["b"]["reason"]
    bench.report.write_text("{")
    bench.run("ac")
    assert bench.seen == ["a", "c"]


# Routes

STOCK = {
    "device": "cuda", "multi_gpu": True, "gpus": "all", "logging": "WARNING", "save_label": True,
    "label_tag": "original", "max_workers": 1, "max_batch_size": 0,
}  # fmt: skip


@pytest.fixture
def trained(served):
    client, studies, _ = served
    path = studies / ".samloop" / "models" / "unet.safetensors"
    fingerprint = constant_unet(path, LABELS, winner=2)
    yield client, studies, fingerprint
    path.unlink()


@pytest.mark.parametrize(
    ("model", "body", "status", "text"),
    [
        ("sam_click_2d", {}, 400, "choose one of unet, sam_auto_net"),
        ("pseudo_label", {}, 400, "choose one of unet, sam_auto_net"),
        ("unet", {}, 409, "not trained yet"),
        ("unet", {"label_tag": "final"}, 400, "use another tag"),
        ("unet", {"label_tag": "../x"}, 400, "tag"),
        ("unet", {"max_workers": "abc"}, 400, "max_workers"),
        ("unet", {"max_batch_size": -1}, 400, "max_batch_size"),
        ("unet", {"restart": "maybe"}, 400, "restart"),
    ],
)
def test_bad_batches_are_refused_at_once(served, request, model, body, status, text):
    client, _, _ = served
    if body:
        request.getfixturevalue("trained")
    reply = client.post(f"/batch/infer/{model}", json=body)
    assert reply.status_code == status, reply.text
    assert text in reply.json()["detail"]


def test_no_report_before_the_first_batch(served):
    client, _, _ = served
    reply = client.get("/batch/report/sam_auto_net")
    assert reply.status_code == 404
    assert "POST /batch/infer/sam_auto_net" in reply.json()["detail"]


def test_a_batch_that_begins_is_running_before_it_has_a_report(served, monkeypatch):
    from apps.samloop.routes import batch

    client, _, _ = served
    task = {"status": "SUBMITTED", "request": {"model": "sam_auto_net"}}
    monkeypatch.setattr(batch, "tasks", lambda _: [task])
    assert client.get("/batch/report/sam_auto_net").json() == {"model": "sam_auto_net", "running": True}
    assert client.get("/batch/report/sam_auto_cam").status_code == 404


def test_results_are_stored_with_what_they_follow_from(trained, tmp_path):
    client, _, fingerprint = trained
    sent = {
        "label_tag": "proposed",
        "window_level": 40,
        "window_width": 400,
        "gpus": "7",
        "bundle_path": "/x",
    }
    report = client.post("/batch/infer/unet?run_sync=true", json=sent).json()
    assert statuses(report) == {"ct": "done", "photo": "done"}
    assert report["cases"]["ct"]["label_names"] == {"spleen": 2}
    assert report["fingerprint"] == fingerprint
    assert report["settings"] == {"label_tag": "proposed", "window_level": 40, "window_width": 400}
    stored = client.get("/datastore/label?label=ct&tag=proposed")
    (tmp_path / "ct.nii.gz").write_bytes(stored.content)
    assert (np.asarray(nib.load(tmp_path / "ct.nii.gz").dataobj) == 2).all()
    info = client.get("/datastore/label/info?label=ct&tag=proposed").json()
    assert info["provenance"]["fingerprint"] == fingerprint
    assert info["provenance"]["settings"] == {"window_level": 40, "window_width": 400}
    assert client.get("/info/").json()["datastore"]["completed"] == 0

    again = client.post("/batch/infer/unet?run_sync=true", json=sent).json()
    assert statuses(again) == {"ct": "skipped", "photo": "skipped"}
    assert client.get("/batch/report/unet").json() == {"running": False, **again}
    other = {"label": ("l.nii.gz", stored.content)}
    assert client.put("/datastore/label?image=ct&tag=proposed", files=other).status_code == 200
    assert statuses(client.post("/batch/infer/unet?run_sync=true", json=sent).json()) == {
        "ct": "done",
        "photo": "skipped",
    }, "what a person put in its place is not taken for the result"


def test_only_the_images_that_are_asked_for(trained, tmp_path):
    client, _, _ = trained
    nib.save(nib.Nifti1Image(np.ones((24, 20, 6), np.uint8), np.diag([1, 1, 2, 1])), tmp_path / "l.nii.gz")
    files = {"label": ("l.nii.gz", (tmp_path / "l.nii.gz").read_bytes())}
    assert client.put("/datastore/label?image=ct", files=files).status_code == 200
    try:
        for which, expected in (("labeled", {"ct"}), ("unlabeled", {"photo"}), ("all", {"ct", "photo"})):
            reply = client.post(f"/batch/infer/unet?run_sync=true&images={which}", json={"label_tag": which})
            assert set(reply.json()["cases"]) == expected
        first = client.post("/batch/infer/unet?run_sync=true", json={"max_batch_size": 1}).json()
        assert set(first["cases"]) == {"ct"}
    finally:
        client.delete("/datastore/label?id=ct&tag=final")


@pytest.mark.slow
def test_a_batch_as_stock_clients_start_it_runs_in_the_background(trained):
    """In a process of its own, on a computer without a GPU too."""
    client, _, _ = trained
    assert client.post("/batch/infer/unet", json={**STOCK, "restart": True}).status_code == 200
    deadline = time.monotonic() + 300
    while client.get("/batch/infer?check_if_running=true").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status = client.get("/batch/infer").json()
    assert status["status"] == "DONE", status["details"]
    report = client.get("/batch/report/unet").json()
    assert not report["running"]
    assert report["ended"]
    assert report["failed"] == 0
    assert set(report["cases"]) == {"ct", "photo"}
    assert client.get("/datastore/label?label=ct&tag=original").status_code == 200
