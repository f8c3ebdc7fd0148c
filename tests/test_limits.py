"""How much anybody may send, ask and keep."""

import io
import json
import threading
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from apps.samloop import bodies, buckets
from tests.test_server import infer


def test_who_asks_too_often_waits(entered):
    client = entered(per_minute=5)
    statuses = [client.get("/info/").status_code for _ in range(8)]
    assert statuses == [200] * 5 + [429] * 3
    answer = client.get("/info/")
    assert 0 < int(answer.headers["retry-after"]) <= 13
    assert client.get("/health").status_code == 200
    assert client.get("/ohif/app-config.js").status_code == 200
    assert TestClient(client.app, client=("10.1.2.4", 5)).get("/info/").status_code == 200
    local = TestClient(client.app, client=("127.0.0.1", 5))
    assert {local.get("/session/0").status_code for _ in range(20)} == {404}


def test_counting_forgets_the_quiet_ones_and_takes_an_ipv6_site_for_one(monkeypatch):
    monkeypatch.setattr(buckets, "REMEMBERED", 3)
    counted = buckets.Buckets(per_minute=60, burst=2)
    for n in range(5):
        assert counted.take(str(n)) == 0
    assert set(counted._levels) == {"2", "3", "4"}
    assert buckets.client_key(("2001:db8:1:2:3::4", 1)) == buckets.client_key(("2001:db8:1:2:9::9", 1))
    assert buckets.client_key(("2001:db8:1:3::4", 1)) != buckets.client_key(("2001:db8:1:2::4", 1))
    assert buckets.client_key(("::ffff:10.0.0.1", 1)) == "10.0.0.1"


def multipart(size):
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.nii.gz"\r\n\r\n'
    return head, b"\0" * size, b"\r\n--x--\r\n"


@pytest.mark.parametrize("path", ["/session/", "/datastore/image", "/infer/sam_click_2d"])
def test_an_upload_is_bounded_whether_it_says_its_length_or_not(entered, path):
    client = entered(max_upload=1 << 20)
    method = "POST" if path.startswith("/infer") else "PUT"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    read = []

    def stream(megabytes):
        head, piece, tail = multipart(1 << 16)
        yield head
        for n in range(megabytes * 16):
            read.append(n)
            yield piece
        yield tail

    told = client.request(method, path, content=b"".join(multipart(2 << 20)), headers=headers)
    assert told.status_code == 413 and "1 MB at most" in told.json()["detail"]
    silent = client.request(method, path, content=stream(2), headers=headers)
    assert silent.status_code == 413 and "1 MB at most" in silent.json()["detail"]
    assert client.put("/session/", content=stream(0), headers=headers).status_code in (415, 422), "as ever"


def test_dicom_files_for_the_pacs_are_an_upload(entered):
    """There is no PACS here: what gets through meets no route."""
    client = entered(max_upload=6 << 20)
    headers = {"content-type": 'multipart/related; type="application/dicom"; boundary=x'}
    for size, status in ((5 << 20, 404), (7 << 20, 413)):
        assert (
            client.post("/proxy/dicom/stow/studies", content=bytes(size), headers=headers).status_code
            == status
        )
    assert client.post("/train/unet", content=bytes(5 << 20), headers=headers).status_code == 413


def test_an_upload_that_would_fill_the_disk_is_refused(entered, monkeypatch):
    client = entered(keep_free=1 << 62)
    answer = client.put("/session/", files=[("files", ("a.png", b"x"))])
    assert answer.status_code == 507 and "disk is full" in answer.json()["detail"]
    assert client.get("/info/").status_code == 200
    disks = bodies.Disks([], keep=10)
    monkeypatch.setattr(disks, "look", lambda: 100)
    import anyio

    anyio.run(disks.check, 100)
    with pytest.raises(bodies.Refusal):
        anyio.run(disks.check, 101)


def test_an_upload_that_stalls_is_given_up(monkeypatch):
    """Straight through ASGI: the test client sends everything at once."""
    import anyio

    monkeypatch.setattr(bodies, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(bodies, "_LINGER_SECONDS", 0.05)
    sent = []

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def receive():
        await anyio.sleep_forever()

    async def send(message):
        sent.append(message)

    async def call():
        guard = bodies.Bodies(app, max_upload=100, disks=bodies.Disks(["/"], keep=0))
        headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"content-length", b"50")]
        scope = {"type": "http", "path": "/infer/x", "method": "POST", "headers": headers}
        await guard(scope, receive, send)
        return guard

    guard = anyio.run(call)
    assert sent[0]["status"] == 408 and sent[-1].get("more_body", False) is False
    assert guard._receiving == 0


def test_a_full_queue_says_so(served, monkeypatch):
    from apps.samloop import pool

    client, _, engine = served
    monkeypatch.setattr(pool, "MAX_WAITING", 2)
    workers = client.app.state.pool._max_workers
    inside, release = threading.Semaphore(0), threading.Event()
    decode = engine.decode

    def held(*arguments):
        inside.release()
        assert release.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(engine, "decode", held)
    answers = []

    def ask(n):
        answers.append(infer(client, foreground=[[6 + n % 3, 6, 2]], window_level=n, window_width=300))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(workers + 2)]
    try:
        for thread in threads[:workers]:
            thread.start()
        for _ in range(workers):
            assert inside.acquire(timeout=60)
        for thread in threads[workers:]:
            thread.start()
        while client.app.state.pool.waiting < 2:
            time.sleep(0.001)
        refused = infer(client, foreground=[[7, 7, 3]])
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert "samloop_infer_waiting 2.0" in client.get("/metrics").text
    finally:
        release.set()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [200] * len(threads)
    assert client.app.state.pool.waiting == client.app.state.pool.running == 0


# Sessions


def test_sessions_are_bounded_in_time_and_bytes(served, monkeypatch):
    from monailabel.interfaces.utils.app import app_instance

    from apps.samloop import sessions

    client, studies, _ = served
    picture = (studies / "photo.png").read_bytes()

    def create(query=""):
        return client.put(f"/session/{query}", files=[("files", ("a.png", io.BytesIO(picture)))])

    negative = create("?expiry=-5")
    assert negative.status_code == 400 and "expiry = -5" in negative.json()["detail"]
    assert create(f"?expiry={10**9}").json()["session_info"]["expiry"] <= sessions.MAX_EXPIRY
    monkeypatch.setattr(sessions, "MAX_BYTES", len(picture))
    full = create()
    assert full.status_code == 507 and "full" in full.json()["detail"]
    for item in list(app_instance().sessions()):
        record = next(iter(Path(app_instance().sessions().store_path, item).glob("meta.info")))
        record.write_text(json.dumps({**json.loads(record.read_text()), "last_access_ts": 0}))
    assert create().status_code == 200, "what has expired makes room"


def test_a_session_without_a_record_keeps_nobody_from_cleaning(served):
    import os

    from monailabel.interfaces.utils.app import app_instance

    store = app_instance().sessions().store_path
    fresh, old = (sessions_folder(store, name) for name in ("fresh", "old"))
    os.utime(old, (0, 0))
    app_instance().cleanup_sessions()
    assert fresh.is_dir() and not old.exists()


def sessions_folder(store, name):
    folder = Path(store, name)
    folder.mkdir(parents=True)
    (folder / "meta.info").write_text('{"half')
    return folder
