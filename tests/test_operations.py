"""What the server tells about itself, while it starts, works and fails: health, logs, counters."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from monailabel.interfaces.utils.app import app_instance

from apps.samloop import observe
from apps.samloop.lifecycle import Lifecycle
from apps.samloop.scratch import scratch
from sam_infer.errors import InputError
from tests.test_server import infer

WINDOW = {"window_level": -400, "window_width": 1600}


def fresh():
    from apps.samloop.access import Access
    from apps.samloop.server import create_app

    return TestClient(create_app(Access(keep_free=0)), raise_server_exceptions=False)


# Health


def test_it_lives_before_it_is_ready_and_who_wants_an_inference_waits(served, monkeypatch):
    release, answers = threading.Event(), []
    monkeypatch.setattr(app_instance().project.__class__, "infer_workers", 1, raising=False)
    monkeypatch.setattr(app_instance(), "warm_up", lambda: release.wait(60))
    with fresh() as client:
        assert client.get("/health").json() == {"status": "ok"}
        before = client.get("/ready")
        assert before.status_code == 503 and before.headers["retry-after"]
        assert before.json()["checks"]["engine"] == "is warming up"
        assert client.get("/info/").status_code == 200
        thread = threading.Thread(
            target=lambda: answers.append(infer(client, foreground=[[6, 6, 2]], **WINDOW))
        )
        thread.start()
        release.set()
        thread.join(60)
        assert answers[0].status_code == 200
        after = client.get("/ready")
        assert after.status_code == 200, after.text
        assert set(after.json()["checks"].values()) == {"ok"}


def test_an_engine_that_fails_is_told_without_its_inside(served, monkeypatch):
    def broken():
        raise InputError("weights", "/secret/place", "no such file")

    monkeypatch.setattr(app_instance(), "warm_up", broken)
    with fresh() as client:
        while (found := client.get("/ready").json()["checks"]["engine"]) == "is warming up":
            pass
        assert found == "cannot be used"
        assert isinstance(client.app.state.lifecycle.failure, InputError)
        assert client.get("/health").status_code == 200


class Pacs:
    """A datastore that depends on another server, as the application sees it."""

    def __init__(self, reachable):
        self.reachable = reachable

    def state(self):
        return {"reachable": self.reachable, "reason": None, "waiting": 3}

    def status(self):
        return {"total": 7, "completed": 2}


def test_it_is_not_ready_without_pacs_disk_or_store(served, monkeypatch):
    client, _, _ = served
    lifecycle = client.app.state.lifecycle
    assert client.get("/ready").status_code == 200
    monkeypatch.setattr(app_instance(), "datastore", lambda: Pacs(False))
    assert client.get("/ready").json()["checks"]["pacs"] == "does not answer"
    text = client.get("/metrics").text
    assert "samloop_pacs_reachable 0.0" in text and "samloop_pacs_waiting 3.0" in text
    monkeypatch.setattr(app_instance(), "datastore", lambda: Pacs(True))
    assert client.get("/ready").json()["checks"]["pacs"] == "ok"
    monkeypatch.setattr(lifecycle._disks, "keep", 1 << 62)
    assert client.get("/ready").json()["checks"]["disk"] == "is nearly full"
    monkeypatch.setattr(lifecycle, "_folder", Path("/nowhere"))
    assert client.get("/ready").json()["checks"]["store"] == "cannot be written"


def test_a_look_that_hangs_is_not_waited_for_and_not_repeated(served, monkeypatch):
    from apps.samloop import lifecycle

    client, _, _ = served
    release, looks = threading.Event(), []

    def hangs(self):
        looks.append(1)
        release.wait(60)
        return {"store": "ok"}

    monkeypatch.setattr(lifecycle, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(Lifecycle, "_found", hangs)
    try:
        for _ in range(3):
            assert client.get("/ready").json()["checks"]["store"] == "does not answer"
        assert client.get("/health").status_code == 200
        assert len(looks) == 1
    finally:
        release.set()


# Requests


def test_a_request_has_an_id_in_every_thread_that_works_for_it(served, monkeypatch):
    client, _, engine = served
    seen, decode = [], engine.decode

    def noting(*arguments):
        seen.append(observe.REQUEST_ID.get())
        return decode(*arguments)

    monkeypatch.setattr(engine, "decode", noting)
    ids = {"x-request-id": "from.the-proxy_1"}
    reply = client.post(
        "/infer/sam_click_2d?image=ct",
        data={"params": json.dumps({"foreground": [[5, 5, 1]], "window_level": 3, "window_width": 901})},
        headers=ids,
    )
    assert reply.status_code == 200 and reply.headers["x-request-id"] == "from.the-proxy_1"
    assert set(seen) == {"from.the-proxy_1"}
    for bad in ("x" * 65, "a b", "a\tb", ".x", 'a"b'):
        given = client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad and len(given) == 16
    assert client.get("/health").headers["x-request-id"] != client.get("/health").headers["x-request-id"]


def test_a_line_names_the_route_and_neither_the_case_nor_the_query(served, caplog):
    client, _, _ = served
    with caplog.at_level(logging.INFO):
        client.get("/datastore/image?image=Mueller_Hans&token=hidden-in-a-query")
        client.get("/session/00aa?update_ts=true")
        client.get("/nothing/Mueller_Hans")
        client.request("BREW", "/info/")
        client.get("/health")
    told = [record for record in caplog.records if record.name == "samloop.request"]
    lines = [(r.fields["method"], r.fields["route"], r.fields["status"]) for r in told]
    assert lines == [
        ("GET", "/datastore/image", 404),
        ("GET", "/session/{session_id}", 404),
        ("GET", "-", 404),
        ("BREW", lines[3][1], 405),
    ]
    whole = " ".join(f"{r.getMessage()} {r.fields}" for r in told)
    assert "Mueller" not in whole and "hidden" not in whole
    assert told[0].fields["bytes"] > 0 and told[0].fields["seconds"] > 0


def test_json_lines_say_all_of_a_record():
    record = logging.LogRecord("a.b", logging.ERROR, "f", 1, "two\nlines %s", ("é",), None)
    record.fields = {"status": 3}
    token = observe.REQUEST_ID.set("id1")
    try:
        try:
            raise ValueError("why")
        except ValueError:
            record.exc_info = sys.exc_info()
        line = observe.JsonFormatter().format(record)
    finally:
        observe.REQUEST_ID.reset(token)
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "two\nlines é" and told["request_id"] == "id1" and told["status"] == 3
    assert told["level"] == "ERROR" and "ValueError: why" in told["exception"]
    assert told["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("/secret"), 500), (OSError(28, "No space left", "/secret"), 507)]
)
def test_what_nobody_expected_is_an_answer_like_others(served, monkeypatch, caplog, error, status):
    client, _, engine = served

    def broken(*_):
        raise error

    monkeypatch.setattr(engine, "decode", broken)
    reply = infer(client, foreground=[[8, 8, 4]], window_level=7, window_width=777 + status)
    assert reply.status_code == status and "secret" not in reply.text
    assert reply.headers["x-content-type-options"] == "nosniff"
    name = reply.headers["x-request-id"]
    assert any(name in record.getMessage() and record.exc_info for record in caplog.records)


# Counters


def test_counters_name_routes_and_models_and_nobody(served):
    with fresh() as client:
        assert infer(client, foreground=[[6, 6, 2]], **WINDOW).status_code == 200
        client.get("/datastore/image?image=Mueller_Hans")
        client.request("BREW", "/x/Mueller_Hans")
        text = client.get("/metrics").text
    for line in (
        'samloop_requests_total{method="POST",route="/infer/{model}",status="200"}',
        'samloop_requests_total{method="other",route="-",status=',
        'samloop_request_seconds_bucket{le="0.1",route="/infer/{model}"}',
        'samloop_infer_seconds_count{model="sam_click_2d",stage="decode"}',
        'samloop_cases{kind="all"} 2.0',
        'samloop_embeddings_total{cached="',
        "samloop_infer_waiting 0.0",
        "samloop_room_bytes ",
        "process_resident_memory_bytes ",
    ):
        assert line in text, line
    assert "Mueller" not in text and "pacs" not in text.replace("# HELP", "").split("samloop_pacs")[0]


def test_a_counter_that_cannot_be_told_hides_no_other(served, monkeypatch):
    client, _, _ = served

    def broken():
        raise RuntimeError("gone")

    monkeypatch.setattr(app_instance(), "datastore", broken)
    text = client.get("/metrics").text
    assert "samloop_infer_waiting 0.0" in text and "samloop_cases{" not in text


# Temporary files

HOLD = """
import sys, time
from apps.samloop.scratch import scratch
import tempfile
with scratch() as folder:
    open(tempfile.mkstemp(suffix=".nii.gz")[1], "w").write("patient")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_server_received_is_removed_and_a_living_ones_is_not(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}

    def start():
        held = subprocess.Popen(
            [sys.executable, "-c", HOLD], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return held, Path(held.stdout.readline().strip())

    living, kept = start()
    killed, left = start()
    assert left.parent == kept.parent and left.stat().st_mode & 0o077 == 0
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list(left.iterdir())
    next_one, _ = start()
    assert not left.exists()
    assert list(kept.iterdir())
    for process in (living, next_one):
        process.communicate("", timeout=60)
        assert process.returncode == 0
    root = kept.parent
    assert [path for path in root.iterdir() if path.is_dir()] == []


def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"samloop-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(InputError, match="TMPDIR"), scratch():
        pass
