"""Fetching checkpoints from a server of this machine that fails in every way servers do."""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from apps.samloop.cli import main
from sam_infer.engines import catalog, fetching
from sam_infer.engines.fetching import ATTEMPTS, fetch
from sam_infer.engines.integrity import check, record_of
from sam_infer.engines.location import VARIABLE, find_folder
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TAG = '"first"'


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.content`` as the server's settings say, and keeps what it was asked."""

    def do_GET(self):
        server = self.server
        server.asked.append(dict(self.headers))
        content, first = server.content, 0
        if server.statuses:
            self.send_response(server.statuses.pop(0))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and server.ranges and self.headers.get("If-Range", server.tag) == server.tag:
            first = int(asked[1])
        if first >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Type", server.kind)
        if server.length:
            self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        stop = server.stops.pop(0) if server.stops else len(content)
        for start in range(first, min(stop, len(content)), 100_000):
            self.wfile.write(content[start : min(start + 100_000, stop)])
            time.sleep(server.pause)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server; ``stops`` are the places in the file at which its next answers break off."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.tag, server.kind = CONTENT, TAG, "application/octet-stream"
    server.ranges, server.length, server.pause = True, True, 0.0
    server.asked, server.stops, server.statuses = [], [], []
    server.handle_error = lambda *_: None  # Clients that hang up are part of the tests.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def entry(server):
    return dataclasses.replace(
        catalog.CATALOG["mobile_sam"],
        addresses=(f"http://127.0.0.1:{server.server_port}/mobile_sam.pt",),
        size=len(CONTENT),
        sha256=SHA256,
    )


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between this process and its server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def get(tmp_path):
    """Fetches without waiting; keeps the pauses it would have made."""
    pauses = []

    def get(entry, **arguments):
        return fetch(entry, folder=tmp_path, wait=pauses.append, **arguments)

    get.pauses = pauses
    return get


def left(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_a_file_is_fetched_whole_and_once(server, entry, get, tmp_path):
    seen = []
    path = get(entry, report=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "mobile_sam.pt" and path.read_bytes() == CONTENT
    assert left(tmp_path) == ["mobile_sam.pt"]
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    get(entry)
    assert len(server.asked) == 1, "an intact file is not fetched again"


def test_a_broken_transfer_goes_on_where_it_stopped(server, entry, get, tmp_path):
    server.stops = [1_200_000, 2_500_000]
    assert get(entry).read_bytes() == CONTENT
    ranges = [(asked.get("Range"), asked.get("If-Range")) for asked in server.asked]
    assert ranges[0] == (None, None) and len(ranges) == 3
    for asked, tag in ranges[1:]:
        assert int(asked.removeprefix("bytes=").removesuffix("-")) > 1_000_000 and tag == TAG
    assert left(tmp_path) == ["mobile_sam.pt"]


def test_a_server_without_ranges_gives_the_file_from_its_start(server, entry, get):
    server.ranges, server.stops = False, [1_200_000]
    assert get(entry).read_bytes() == CONTENT


def test_a_file_that_changes_in_between_is_begun_again(server, entry, get, tmp_path):
    server.stops = [1_200_000]
    server.statuses = []
    other = dataclasses.replace(entry, sha256=None, size=None)
    changed = CONTENT[::-1]

    def change(_seconds):
        server.content, server.tag = changed, '"second"'

    path = fetch(other, folder=tmp_path, wait=change)
    assert path.read_bytes() == changed
    assert server.asked[1]["If-Range"] == TAG


def test_a_server_that_ignores_if_range_is_found_out(server, entry, get, tmp_path, monkeypatch):
    server.stops = [1_200_000]
    other = dataclasses.replace(entry, sha256=None, size=None)
    changed = CONTENT[::-1]

    def change(_seconds):
        server.content, server.tag = changed, '"second"'
        monkeypatch.setattr(Handler, "parse_request", without_if_range, raising=True)

    parse = Handler.parse_request

    def without_if_range(self):
        done = parse(self)
        del self.headers["If-Range"]
        return done

    assert fetch(other, folder=tmp_path, wait=change).read_bytes() == changed
    assert [asked.get("Range") is not None for asked in server.asked] == [False, True, False]


def test_an_unknown_file_without_a_validator_is_begun_again(server, entry, get):
    server.tag, server.stops = None, [1_200_000]
    unknown = dataclasses.replace(entry, sha256=None, size=None)
    assert get(unknown).read_bytes() == CONTENT
    assert "If-Range" not in server.asked[1]


def test_passing_faults_are_waited_for(server, entry, get):
    server.statuses = [503, 429]
    assert get(entry).read_bytes() == CONTENT
    assert get.pauses == [1.0, 2.0]


def test_a_server_that_always_breaks_off_at_once_is_given_up(server, entry, get, tmp_path):
    server.stops = [0] * 20
    with pytest.raises(InputError, match="could not be fetched"):
        get(entry)
    assert len(server.asked) == ATTEMPTS
    assert left(tmp_path) == ["mobile_sam.pt.part", "mobile_sam.pt.part.json"]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_is_not_there_is_told_with_the_way_by_hand(server, entry, get, tmp_path, status):
    server.statuses = [status]
    by_hand = f"download http://.* and put it into {tmp_path} as mobile_sam"
    with pytest.raises(InputError, match=rf"could not be fetched \(http://127.*HTTP {status}.*{by_hand}"):
        get(entry)
    assert len(server.asked) == 1 and left(tmp_path) == []


def test_offline_is_told_with_the_way_by_hand(entry, get, tmp_path):
    closed = dataclasses.replace(entry, addresses=("http://127.0.0.1:9/mobile_sam.pt",))
    with pytest.raises(InputError, match=rf"Connection refused.*put it into {tmp_path} as mobile_sam\.pt"):
        get(closed)
    assert len(get.pauses) == ATTEMPTS - 1


def test_the_next_address_is_asked_where_one_fails(server, entry, get):
    server.statuses = [404]
    both = dataclasses.replace(entry, addresses=entry.addresses * 2)
    assert get(both).read_bytes() == CONTENT


def test_another_file_is_refused_and_deleted(server, entry, get, tmp_path):
    server.content = CONTENT[::-1]
    with pytest.raises(
        InputError, match=f"another file than the catalogue's.*not the catalogue's SHA-256 .{SHA256}"
    ):
        get(entry)
    assert left(tmp_path) == []


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, entry, get, tmp_path):
    server.content = CONTENT + b"more"
    with pytest.raises(InputError, match="offers 3000004 bytes instead of 3000000"):
        get(entry)
    assert left(tmp_path) == []


def test_a_file_without_an_end_is_cut(server, entry, get, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "LARGEST", 1_000_000)
    server.length = False
    with pytest.raises(InputError, match="gives more than 1000000 bytes"):
        get(dataclasses.replace(entry, size=None))
    assert left(tmp_path) == []


def test_a_disk_without_room_is_told(entry, get, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(InputError, match="has 10 bytes free, 3000000 are needed"):
        get(entry)


class _Usage:
    free = 10


def test_a_web_page_is_refused(server, entry, get):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(InputError, match="answers with a web page"):
        get(entry)


def test_a_file_whose_hash_nobody_knows_is_recorded_and_checked_ever_after(entry, get):
    unknown = dataclasses.replace(entry, sha256=None, size=None)
    path = get(unknown)
    assert record_of(path).read_text() == f"{SHA256}  mobile_sam.pt\n"
    assert check(unknown, path).good is True
    path.write_bytes(CONTENT[::-1])
    assert check(unknown, path).good is False
    assert get(unknown).read_bytes() == CONTENT, "a damaged file is fetched again"
    record_of(path).unlink()
    assert check(unknown, path).good is None


def test_what_nobody_could_tell_from_a_part_is_refused(server, entry, get, tmp_path):
    unknown = dataclasses.replace(entry, sha256=None, size=None)
    server.length, server.stops = False, [1_200_000]
    with pytest.raises(InputError, match="does not tell the file's size"):
        get(unknown)
    assert left(tmp_path) == []


def test_an_empty_answer_is_no_file(server, entry, get, tmp_path):
    server.statuses = [200]
    with pytest.raises(InputError, match="gives an empty file"):
        get(dataclasses.replace(entry, sha256=None, size=None))
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_told(entry, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        fetch(entry, folder=tmp_path / "file" / "weights")


def test_packaged_weights_are_not_fetched():
    with pytest.raises(InputError, match="comes with the package"):
        fetch(catalog.CATALOG["bundled"])


@contextlib.contextmanager
def processes(count, entry, folder):
    """Processes that fetch the file; they are forked, so that they need not import everything again."""
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=fetch, args=(entry,), kwargs={"folder": folder}) for _ in range(count)]
    for process in running:
        process.start()
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for 60 s"
        time.sleep(0.02)


def test_a_killed_fetch_leaves_no_file_and_is_resumed(server, entry, get, tmp_path):
    server.pause = 0.05
    part = tmp_path / "mobile_sam.pt.part"
    with processes(1, entry, tmp_path):
        until(lambda: part.is_file() and part.stat().st_size > 1_000_000)
    assert "mobile_sam.pt" not in left(tmp_path)
    server.pause = 0.0
    assert get(entry).read_bytes() == CONTENT
    assert int(re.findall(r"\d+", server.asked[-1]["Range"])[0]) > 1_000_000


def test_two_processes_fetch_a_file_once(server, entry, tmp_path):
    server.pause = 0.02
    with processes(2, entry, tmp_path) as both:
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
    assert len(server.asked) == 1 and (tmp_path / "mobile_sam.pt").read_bytes() == CONTENT
    assert left(tmp_path) == ["mobile_sam.pt"]


def test_the_command_line_lists_fetches_verifies_and_prints(entry, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "weights"))
    monkeypatch.setitem(catalog.CATALOG, "mobile_sam", entry)
    file = tmp_path / "weights" / "mobile_sam.pt"
    assert main(["weights", "path", "mobile_sam"]) == 2
    assert "samloop weights fetch mobile_sam" in capsys.readouterr().err
    assert main(["weights", "verify", "mobile_sam"]) == 1
    assert "not here" in capsys.readouterr().out
    assert main(["weights", "verify"]) == 0, "nothing that is there is wrong"
    assert "not here" in capsys.readouterr().out
    assert main(["weights", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in catalog.CATALOG)
    assert re.search(r"mobile_sam +3\.0 MB .*\n +not here; weights Apache-2\.0", listed)
    assert "NOT FOR COMMERCIAL USE" in listed.partition("medsam2")[2]
    assert main(["weights", "fetch", "mobile_sam"]) == 0
    assert f"mobile_sam: {file}" in capsys.readouterr().out
    assert main(["weights", "path", "mobile_sam"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert main(["weights", "verify"]) == 0
    assert "matches the catalogue's SHA-256" in capsys.readouterr().out
    file.write_bytes(CONTENT[::-1])
    assert main(["weights", "verify", "mobile_sam"]) == 1
    assert "BAD: has SHA-256" in capsys.readouterr().out
    assert main(["weights", "list", "--folder", str(tmp_path / "nowhere"), "mobile_sam", "bundled"]) == 0
    listed = capsys.readouterr().out
    assert "not here" in listed and str(catalog.PACKAGED / "bundled.safetensors") in listed
    assert main(["weights", "fetch", "sam_vit_x"]) == 2
    assert "choose one of bundled" in capsys.readouterr().err
    assert main(["weights", "list", "--folder", str(file)]) == 2


@pytest.fixture
def several(server, monkeypatch):
    """A model of two files, of one of which nothing is known."""

    def file(name, *, size=None, sha256=None):
        like = catalog.FOLDERS["biomed_clip"].files[0]
        address = f"http://127.0.0.1:{server.server_port}/{name}"
        return dataclasses.replace(
            like, file=f"biomed_clip/{name}", addresses=(address,), size=size, sha256=sha256
        )

    files = (file("vocab.txt"), file("weights.bin", size=len(CONTENT), sha256=SHA256))
    entry = dataclasses.replace(catalog.FOLDERS["biomed_clip"], files=files)
    monkeypatch.setitem(catalog.FOLDERS, "biomed_clip", entry)
    return entry


def test_a_model_of_several_files_is_fetched_into_its_folder(server, several, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    target = tmp_path / "biomed_clip"
    assert main(["weights", "path", "biomed_clip"]) == 2
    told = capsys.readouterr().err
    assert "samloop weights fetch biomed_clip" in told and f"put it into {target} as vocab.txt" in told
    assert "clip.weights" in told
    assert main(["weights", "verify", "biomed_clip"]) == 1
    assert re.search(r"biomed_clip +vocab.txt: not here\n", capsys.readouterr().out)
    assert main(["weights", "list", "biomed_clip"]) == 0
    assert re.search(r"biomed_clip +3\.0 MB .*\n +not here; weights MIT", capsys.readouterr().out)
    assert main(["weights", "fetch", "biomed_clip"]) == 0
    assert left(target) == ["vocab.txt", "vocab.txt.sha256", "weights.bin"]
    assert len(server.asked) == 2 and capsys.readouterr().out.count(f"biomed_clip: {target}") == 2
    assert main(["weights", "path", "biomed_clip"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert main(["weights", "list"]) == 0
    assert f"{target}; weights MIT" in capsys.readouterr().out
    assert main(["weights", "verify"]) == 0
    assert "recorded when it was fetched" in capsys.readouterr().out
    (target / "vocab.txt").write_bytes(b"other")
    assert main(["weights", "verify", "biomed_clip"]) == 1
    told = capsys.readouterr().out
    assert "vocab.txt: BAD" in told and "weights.bin: matches the catalogue's SHA-256" in told
    (target / "weights.bin").write_bytes(b"half")
    with pytest.raises(InputError, match=r"weights\.bin.*not whole"):
        find_folder(several)


def test_a_model_that_serves_engines_is_none():
    assert not set(catalog.FOLDERS) & set(catalog.CATALOG)
    for name, entry in catalog.FOLDERS.items():
        assert entry.name == name and all(one.name == name for one in entry.files)
        assert all(
            one.file.startswith(f"{name}/") and one.addresses and not one.packaged for one in entry.files
        )
    with pytest.raises(InputError, match="choose one of bundled"):
        create_engine("biomed_clip")
