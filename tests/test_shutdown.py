"""Ending: with what was begun, or at once; and what is not left behind. Real server processes and signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
from monailabel.utils.async_tasks import utils as background

from apps.samloop import lifecycle
from tests.conftest import server_process
from tests.slicer_parts import Panel
from tests.test_server import infer

#: samloop, changed by `change` once its settings are read and before its application is made.
CHANGED = """
import sys
from apps.samloop import access
read = access.access_of
def then_change(*arguments, **named):
    change()
    return read(*arguments, **named)
access.access_of = then_change
from apps.samloop.cli import main
sys.exit(main(sys.argv[1:]))
"""
#: A save says when it has begun, and waits until it may go on.
SLOW_SAVE = f"""
def change():
    import time
    from pathlib import Path
    from apps.samloop.store import SafeDatastore
    save = SafeDatastore.save_label
    def slow(self, *arguments):
        Path("begun").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        return save(self, *arguments)
    SafeDatastore.save_label = slow
{CHANGED}"""
BROKEN_ENGINE = f"""
def change():
    from apps.samloop.lifecycle import Lifecycle
    from sam_infer.errors import InputError
    begin = Lifecycle.begin
    def broken(self):
        def fail():
            raise InputError("weights", "x.pt", "they are of another model")
        self._instance.warm_up = fail
        begin(self)
    Lifecycle.begin = broken
{CHANGED}"""


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.zeros((24, 20, 6), np.int16), np.eye(4)), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((24, 20, 6), np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    return folder


def until(happened, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(url):
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname, address.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def accept(url, folder):
    with (folder / "label.nii.gz").open("rb") as label:
        return requests.put(
            f"{url}/datastore/label?image=ct", files={"label": ("l.nii.gz", label)}, timeout=120
        )


def test_a_save_that_has_begun_ends_well(tmp_path, studies):
    with (
        server_process(studies, tmp_path, command=("-c", SLOW_SAVE)) as (url, process),
        ThreadPoolExecutor(1) as pool,
    ):
        saving = pool.submit(accept, url, tmp_path)
        until((tmp_path / "begun").exists)
        process.send_signal(signal.SIGTERM)
        until(lambda: refused(url))
        assert not saving.done() and process.poll() is None
        (tmp_path / "go").touch()
        assert saving.result(60).status_code == 200
        assert process.wait(60) == 0
    assert np.asarray(nib.load(studies / "labels" / "final" / "ct.nii.gz").dataobj).all()
    assert not list((studies / "labels" / "final").glob(".*"))


@pytest.mark.parametrize("why", ["told twice", "its time is over"])
def test_it_ends_with_what_never_ends(tmp_path, studies, why):
    hurried = SLOW_SAVE.replace(
        "    save =", "    from apps.samloop import lifecycle\n    lifecycle.DEADLINE = 1\n    save ="
    )
    code = SLOW_SAVE if why == "told twice" else hurried
    with (
        server_process(studies, tmp_path, command=("-c", code)) as (url, process),
        ThreadPoolExecutor(1) as pool,
    ):
        saving = pool.submit(accept, url, tmp_path)
        until((tmp_path / "begun").exists)
        process.send_signal(signal.SIGTERM)
        until(lambda: refused(url))
        if why == "told twice":
            process.send_signal(signal.SIGTERM)
        assert process.wait(25) == 128 + signal.SIGTERM, "the save never ended"
        with pytest.raises(requests.ConnectionError):
            saving.result(60)
    assert not (studies / "labels" / "final" / "ct.nii.gz").exists()


def test_an_engine_that_cannot_be_used_ends_the_server_and_says_why(tmp_path, studies):
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_ENGINE, "serve", "--studies", str(studies), "--port", str(free_port())],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "they are of another model" in done.stderr and "Traceback" not in done.stderr


def test_who_waits_for_an_inference_is_told_and_who_has_one_gets_it(served, monkeypatch):
    from apps.samloop.access import Access
    from apps.samloop.server import create_app
    from tests.test_operations import TestClient

    _, _, engine = served
    inside, release = threading.Semaphore(0), threading.Event()
    decode = engine.decode

    def held(*arguments):
        inside.release()
        assert release.wait(60)
        return decode(*arguments)

    with TestClient(create_app(Access(keep_free=0))) as client, ThreadPoolExecutor(8) as pool:
        until(lambda: client.get("/ready").json()["checks"]["engine"] == "ok")
        monkeypatch.setattr(engine, "decode", held)
        own = client.app.state.pool
        answers = [
            pool.submit(infer, client, foreground=[[6, 6, 2]], window_level=n, window_width=432)
            for n in range(own._max_workers + 2)
        ]
        try:
            for _ in range(own._max_workers):
                assert inside.acquire(timeout=60)
            until(lambda: own.waiting == 2)
            client.app.state.lifecycle.stop()
            assert client.get("/ready").json()["checks"]["server"] == "is being stopped"
            late = infer(client, foreground=[[6, 6, 2]], **{"window_level": 99, "window_width": 9})
            assert late.status_code == 503 and "being stopped" in late.json()["detail"]
        finally:
            release.set()
        statuses = sorted(answer.result(60).status_code for answer in answers)
        assert statuses == [200] * own._max_workers + [503] * 2


#: Stands in for a training: starts a process of its own, says so, and works for ever.
CHILD = """#!/bin/sh
sleep 1000 &
echo $! > {folder}/grandchild.part
mv {folder}/grandchild.part {folder}/grandchild
wait
"""


def test_trainings_are_stopped_with_all_that_they_started_and_none_begins(tmp_path, monkeypatch):
    script = tmp_path / "child"
    script.write_text(CHILD.format(folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setattr(background, "sys", SimpleNamespace(executable=str(script)))
    monkeypatch.setenv("PYTHONPATH", "")
    for name in ("background_tasks", "background_processes", "background_executors"):
        monkeypatch.setattr(background, name, {})
    first = background.run_background_task({"model": "unet"}, "train")
    second = background.run_background_task({"model": "cam"}, "train")
    until((tmp_path / "grandchild").exists)
    grandchild = int((tmp_path / "grandchild").read_text())
    child = next(iter(background.background_processes["train"].values()))
    (executor,) = background.background_executors.values()
    lifecycle.stop_tasks()
    until(lambda: child.poll() is not None)
    until(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == "zombie")
    executor.shutdown(wait=True)
    assert [first["status"], second["status"]] == ["STOPPED", "STOPPED"]
    assert "details" not in second, "the one that waited never began"


@pytest.mark.slow
def test_a_server_that_trains_ends_and_leaves_no_process(tmp_path):
    from trainers.phantoms import write_phantoms

    studies = tmp_path / "studies"
    studies.mkdir()
    write_phantoms(studies, count=8, shape=(48, 48, 16))
    with server_process(studies, tmp_path) as (url, process):
        for image in sorted(path.name.removesuffix(".nii.gz") for path in studies.glob("*.nii.gz")):
            truth = (studies / "truth" / f"{image}.nii.gz").read_bytes()
            saved = requests.put(
                f"{url}/datastore/label?image={image}", files={"label": ("l.nii.gz", truth)}, timeout=60
            )
            assert saved.status_code == 200, saved.text
        started = requests.post(f"{url}/train/unet", json={"iterations": 100_000}, timeout=60)
        assert started.status_code == 200, started.text
        until(
            lambda: requests.get(f"{url}/info/", timeout=60).json()["train_stats"]["unet"].get("running"), 300
        )
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("train" in child.cmdline() for child in children)
        assert 'samloop_trainings{status="running"} 1.0' in requests.get(f"{url}/metrics", timeout=60).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not [child for child in children if child.is_running() and child.status() != "zombie"]


def test_no_token_reaches_the_log_or_a_command_line(tmp_path, studies):
    """The token, and what is issued for it, used in every way, right and wrong; the log is JSON."""
    secret = "v3ry-s3cret-t0ken-of-ours"
    (tmp_path / "token").write_text(secret)
    options = ("--token-file", str(tmp_path / "token"), "--log-format", "json", "--max-upload-mb", "1")
    with server_process(studies, tmp_path, *options) as (url, process):
        bearer = {"authorization": f"Bearer {secret}"}
        form = {"username": "Ann", "password": secret}
        issued = requests.post(f"{url}/auth/token", data=form, timeout=60).json()["access_token"]
        assert requests.get(f"{url}/info/", headers=bearer, timeout=60).status_code == 200
        assert (
            requests.get(f"{url}/info/?token={secret}&access_token={issued}", timeout=60).status_code == 401
        )
        assert requests.get(f"{url}/{secret}", headers=bearer, timeout=60).status_code == 404
        assert requests.get(url, auth=("ann", secret), timeout=60).status_code == 401
        wrong = {"authorization": f"Bearer {secret}x"}
        assert requests.get(f"{url}/info/", headers=wrong, timeout=60).status_code == 401
        assert requests.post(f"{url}/auth/token", data={"username": secret}, timeout=60).status_code == 401
        twice = {"username": secret, "password": secret}
        assert requests.post(f"{url}/auth/token", data=twice, timeout=60).status_code == 401
        browser = requests.Session()
        page = browser.post(f"{url}/login", data={**form, "next": f"/?token={secret}"}, timeout=60)
        assert page.status_code == 200 and "Ann" in page.text
        for name in ("json", "form"):
            body = {"json": {"token": secret}} if name == "json" else {"data": {"params": secret}}
            assert (
                browser.post(f"{url}/infer/sam_click_2d?image={secret}", timeout=60, **body).status_code
                >= 400
            )
        panel = Panel(url, tmp_path, user="Dr Slicer", password=secret)
        assert panel.info["models"] and panel.client().next_sample("first", {})["id"] == "ct"
        big = browser.put(f"{url}/session/", files={"files": ("a.nii.gz", bytes(16 << 20))}, timeout=60)
        assert big.status_code == 413, "and its client reads why"
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=60) as raw:
            raw.sendall(
                b"PUT /session/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\nAuthorization: Bearer "
                + issued.encode()
                + b"\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 413"), "before any of it is sent"
        running = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert not any(secret in " ".join(one.cmdline()) for one in running)
        assert "SAMLOOP_TOKEN" not in os.environ
    log = (tmp_path / "server.log").read_text()
    assert (
        secret not in log and issued not in log and browser.cookies and browser.cookies.values()[0] not in log
    )
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    told = [line for line in lines if line["logger"] == "samloop.request"]
    assert {line["status"] for line in told} >= {200, 303, 401, 404, 413}
    assert {line["user"] for line in told} == {None, "api", "Ann", "Dr Slicer"}
    assert all(set(line) >= {"time", "level", "request_id", "route", "seconds", "bytes"} for line in told)
    rest = [line for line in log.splitlines() if not line.startswith("{")]
    assert rest[0].startswith("samloop serves") and rest[-1] == "Ctrl-C stops it.", rest
    assert Path(tmp_path / "token").read_text() == secret
