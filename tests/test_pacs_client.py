"""The way to a PACS that is no textbook's: pages, damage, crashes, and two who do the same at once."""

import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest

from apps.samloop.pacs.address import address_of
from apps.samloop.pacs.breaker import Breaker
from apps.samloop.pacs.client import PacsClient, RefusedError
from apps.samloop.pacs.dicomweb import Dicomweb
from apps.samloop.pacs.labelnames import LabelNames
from apps.samloop.pacs.multipart import BrokenError, boundary_of, multipart_body, save_parts
from apps.samloop.pacs.outbox import Outbox
from sam_infer.errors import UnavailableError
from tests.dicom_data import write_series
from tests.pacs_app import pacs_store
from tests.pacs_gate import gate_before


def row(uid, modality="CT", count=3):
    values = {"0020000E": uid, "0020000D": "1.2", "00080060": modality, "00201209": count}
    return {tag: {"vr": "UI", "Value": [value]} for tag, value in values.items()}


@pytest.fixture
def fake():
    """A gate with no PACS behind it."""
    with gate_before("http://127.0.0.1:9/nothing") as gate:
        yield gate


def paged(rows, *, size, warn=True, offset=True):
    """A PACS that lists some at a time."""

    def answer(method, path):
        start = int(dict(p.split("=") for p in path.partition("?")[2].split("&") if p).get("offset", 0))
        page = rows[start if offset else 0 :][:size]
        more = warn and start + size < len(rows)
        told = {"Warning": "299 x: There are 7 additional results that can be requested"} if more else {}
        return 200, {"Content-Type": "application/dicom+json", **told}, json.dumps(page).encode()

    return answer


@pytest.mark.parametrize(
    ("count", "options", "found"),
    [
        (7, {"size": 3}, 7),
        (250, {"size": 100, "warn": False}, 250),
        (6, {"size": 3}, 6),
        (9, {"size": 3, "offset": False}, 3),
        (0, {"size": 3}, 0),
    ],
)
def test_lists_are_read_to_their_end(fake, count, options, found):
    fake.answer = paged([row(f"1.2.{n}") for n in range(count)], **options)
    assert len(Dicomweb(PacsClient(address_of(fake.url))).series({})) == found


@pytest.mark.parametrize("content", [b"<html>", b'{"a": 1', b"[1, 2]", b'"text"', b"\xff\xfe", b"[" * 20000])
def test_a_damaged_list_is_told_of(fake, content):
    fake.answer = lambda *_: (200, {"Content-Type": "application/dicom+json"}, content)
    with pytest.raises(UnavailableError, match="its answer to series"):
        Dicomweb(PacsClient(address_of(fake.url))).series({})


def test_rows_without_uids_are_left_out(fake):
    rows = [row("../../etc/passwd"), row("1.2.3"), {"0020000E": None}, {"0020000E": {"Value": [{}]}}]
    fake.answer = paged(rows, size=9)
    assert [entry.uid for entry in Dicomweb(PacsClient(address_of(fake.url))).series({})] == ["1.2.3"]


def test_a_redirection_is_not_followed(fake):
    fake.answer = lambda *_: (302, {"Location": "http://elsewhere.example/login"}, b"")
    with pytest.raises(UnavailableError, match=r"elsewhere\.example"):
        Dicomweb(PacsClient(address_of(fake.url))).series({})
    assert len(fake.asked) == 1


def test_a_connection_that_the_pacs_has_closed_meanwhile_is_no_failure(fake):
    fake.answer = paged([], size=9)
    client = Dicomweb(PacsClient(address_of(fake.url)))
    for _ in range(3):
        client.series({})
        with fake.saying("shut"):  # closes the connection that is kept
            pass
    assert client.client.down is None


def test_user_and_password_of_the_url_are_never_shown():
    address = address_of("https://me:se%40cret@pacs.example:8443/dicom-web/?x=1", wado="/wado/")
    assert (address.url, address.user, address.password) == (
        "https://pacs.example:8443/dicom-web", "me", "se@cret"
    )  # fmt: skip
    assert address.under("wado", "studies/1") == "https://pacs.example:8443/dicom-web/wado/studies/1"
    assert address.under("qido", "studies") == "https://pacs.example:8443/dicom-web/studies"
    assert "se@cret" not in PacsClient(address).what
    assert address_of("http://me:one@pacs/", user="you", password="two").password == "two"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_parts_are_found_however_the_body_is_cut(tmp_path, size):
    parts = [b"", b"\r\n--", b"--b", b"\r\n--bb" * 9, bytes(range(256)) * 5]
    body = b"preamble\r\n" + b"".join(b"--b0\r\nA: b\r\n\r\n%b\r\n" % part for part in parts) + b"--b0--\r\nx"
    pieces = [body[n : n + size] for n in range(0, len(body), size)]
    files = save_parts(pieces, b"b0", tmp_path)
    assert [file.read_bytes() for file in files] == parts
    for end in (len(body) // 3, body.rindex(b"--b0--") + 5):
        with pytest.raises(BrokenError):
            save_parts([body[:end]], b"b0", tmp_path)


def test_boundaries_are_read_as_servers_write_them():
    assert boundary_of('multipart/related; type="application/dicom"; boundary=a-b') == b"a-b"
    assert boundary_of('Multipart/Related;boundary="a b";type=x') == b"a b"
    assert boundary_of("application/dicom") is None
    with pytest.raises(BrokenError):
        boundary_of("multipart/related; type=x")
    body, kind = multipart_body(b"dicom", "zz")
    assert boundary_of(kind) == b"zz" and body.endswith(b"--zz--\r\n")


def test_a_breaker_lets_one_try_at_a_time():
    breaker = Breaker(pause=0.0)
    assert breaker.refusal() is None
    breaker.failed("gone")
    assert breaker.reason == "gone" and breaker.refusal() is None
    slow = Breaker(pause=60.0)
    slow.failed("gone")
    assert [slow.refusal() for _ in range(3)] == ["gone"] * 3
    slow.worked()
    assert slow.refusal() is None


def test_names_are_found_as_written_first():
    names = LabelNames({"Liver": 1, "liver": 2, "left kidney": 3})
    assert [names.index(name) for name in ("Liver", "liver", " Left  Kidney ")] == [1, 2, 3]
    assert names.unknown(["LIVER", "spleen", "left kidney"]) == ["LIVER", "spleen"]


# With Orthanc


@pytest.fixture
def scanned(orthanc, tmp_path):
    """A gate before Orthanc, and a series in it: its files and SeriesInstanceUID."""
    values = np.zeros((24, 20, 6), np.int16)
    files = write_series(tmp_path / "scan", values)
    orthanc.stow(files)
    with gate_before(orthanc.url) as gate:
        yield gate, files, str(pydicom.dcmread(files[0]).SeriesInstanceUID)


def downloads(gate, uid):
    return [path for _, path, _ in gate.asked if path.endswith(uid)]


def test_a_series_is_fetched_once_however_many_ask(scanned, tmp_path):
    gate, _, uid = scanned
    store, other = (pacs_store(gate.url, tmp_path / "data") for _ in range(2))
    together = threading.Barrier(8)

    def ask(n):
        together.wait()
        return (store, other)[n % 2].get_image_uri(uid)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert len(downloads(gate, uid)) == 1


KILLED = """
import os, sys
from tests.pacs_app import pacs_store
import apps.samloop.pacs.{module} as module
def die(*args, **kwargs):
    os._exit(9)
module.{name} = die
store = pacs_store(sys.argv[1], sys.argv[2])
store.get_image_uri(sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [("dicomweb", "_named"), ("files", "sync"), ("volumes", "read_series"), ("images", "save_volume")],
)
def test_a_killed_fetch_leaves_nothing_that_looks_whole(scanned, tmp_path, module, name):
    gate, files, uid = scanned
    code = KILLED.format(module=module, name=name)
    command = [sys.executable, "-c", code, gate.url, str(tmp_path / "data"), uid]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], check=False)
    assert killed.returncode == 9
    store = pacs_store(gate.url, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.nii"))
    assert store._read(Path(store.get_image_uri(uid))).shape == (24, 20, 6)
    assert store._series_files.instances(uid) == {
        str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in files
    }


def test_a_list_with_part_of_a_series_is_no_series(scanned, tmp_path):
    gate, _, uid = scanned

    def short(method, path):
        """Two files of the six that are listed."""
        if not path.endswith(uid):
            return None
        boundary, body = "b", b""
        for file in scanned[1][:2]:
            body += b"--b\r\n\r\n" + file.read_bytes() + b"\r\n"
        return 200, {"Content-Type": f"multipart/related; boundary={boundary}"}, body + b"--b--"

    gate.answer = short
    store = pacs_store(gate.url, tmp_path / "data")
    with pytest.raises(UnavailableError, match="2 of 6 files"):
        store.get_image_uri(uid)
    gate.answer = lambda *_: (
        200,
        {"Content-Type": "multipart/related; boundary=b"},
        b"--b\r\n\r\nno\r\n--b--",
    )
    with pytest.raises(UnavailableError):
        store.get_image_uri(uid)


def test_the_headers_of_segmentations_are_asked_for_once(scanned, orthanc, tmp_path):
    from sam_infer.dicom.seg import write_seg
    from sam_infer.dicom.series import read_series

    gate, files, uid = scanned
    series = read_series(files[0].parent)
    for n in range(5):
        labelmap = np.full((24, 20, 6), 1 + n % 3, np.uint8, order="F")
        made = {"names": {1: "liver", 2: "spleen", 3: "aorta"}, "description": "x", "creator": "x"}
        orthanc.stow([write_seg(labelmap, series, algorithm=None, **made)])
    for _ in range(2):
        store = pacs_store(gate.url, tmp_path / "data")
        assert uid in store.get_labeled_images() and store.status()["completed"] == 1
    assert len([path for _, path, _ in gate.asked if path.endswith("/metadata")]) == 5
    known = tmp_path / "data" / "pacs" / "segs.jsonl"
    known.write_bytes(known.read_bytes()[:-20])  # a crash within the last line
    store = pacs_store(gate.url, tmp_path / "data")
    assert store.status()["completed"] == 1
    assert len([path for _, path, _ in gate.asked if path.endswith("/metadata")]) == 6


def test_what_the_pacs_does_not_say_it_stored_is_not_taken_for_stored(scanned):
    gate, files, _ = scanned
    service = Dicomweb(PacsClient(address_of(gate.url)))
    data = pydicom.dcmread(files[0])
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    buffer = io.BytesIO()
    data.save_as(buffer, write_like_original=False)
    failed = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [43264]}}]}}
    for status, answer in (
        (200, b"<html>Please log in</html>"),
        (200, b""),
        (200, json.dumps(failed).encode()),
        (202, json.dumps([failed]).encode()),
        (409, b""),
        (401, b""),
        (507, b"full"),
    ):
        gate.answer = lambda method, _, s=status, a=answer: (s, {}, a) if method == "POST" else None
        with pytest.raises(RefusedError):
            service.store(buffer.getvalue())
    gate.answer = lambda *_: None
    service.store(buffer.getvalue())
    gate.answer = lambda method, _: (200, {}, b"") if method == "POST" else None
    service.store(buffer.getvalue())  # it says nothing, but lists it


class Post:
    """What is sent, in a list; fails while ``error`` is set."""

    def __init__(self, folder):
        self.sent, self.done, self.error = [], [], None
        self.busy = threading.Lock()
        self.folder = folder

    def outbox(self):
        return Outbox(self.folder, make=lambda name: f"made {name}".encode(), send=self.send, sent=self.note)

    def send(self, content):
        assert self.busy.acquire(blocking=False), "two senders"
        try:
            if self.error:
                raise self.error
            self.sent.append(content)
        finally:
            self.busy.release()

    def note(self, name, content):
        self.done.append((name, content))


def test_what_waits_survives_a_restart_and_is_sent_once(tmp_path):
    post = Post(tmp_path)
    post.error = UnavailableError("the PACS", "down", "wait")
    first = post.outbox()
    first.put("1.2", b"one")
    assert "down" in first.deliver("1.2") and list(first.waiting()) == ["1.2"]
    first.put("1.2", b"two")
    first.put("1.3")
    again = post.outbox()
    assert sorted(again.waiting()) == ["1.2", "1.3"]
    post.error = None
    both = [again, post.outbox()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: both[n % 2].deliver(("1.2", "1.3")[n // 2 % 2]), range(16)))
    assert sorted(post.sent) == [b"made 1.3", b"two"] and again.waiting() == {}
    assert sorted(post.done) == [("1.2", b"two"), ("1.3", b"made 1.3")]


def test_what_is_refused_is_tried_less_and_less_often(tmp_path):
    post = Post(tmp_path)
    post.error = RefusedError("the PACS", "no", "wait", status=409)
    outbox = post.outbox()
    outbox.put("1.2", b"one")
    pauses = []
    for _ in range(9):
        outbox.deliver("1.2")
        pauses.append(outbox._not_before["1.2"][1])
    assert pauses[:3] == [5.0, 10.0, 20.0] and pauses[-1] == 300.0
    outbox.drop("1.2")
    assert outbox.deliver("1.2") is None and outbox.waiting() == {}
