"""`samloop doctor` on installations with each kind of damage, made or played."""

import argparse
import contextlib
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apps.samloop import cli, doctor
from apps.samloop.checks import finding, machine, network, software, weights
from apps.samloop.checks.finding import Subject
from apps.samloop.project import load_project
from sam_infer.engines.catalog import CATALOG
from tests.findings import only, told


@pytest.mark.parametrize(("free", "status"), [(1 << 20, "fail"), (5 << 30, "warn"), (1 << 40, "ok")])
def test_room_on_disks(tmp_path, monkeypatch, free, status):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(finding.shutil, "disk_usage", lambda path: usage)
    assert finding.room("disk", tmp_path / "not" / "yet", "images").status == status


def test_versions_are_compared_with_the_pins(monkeypatch):
    assert {f.status for f in software.versions(Subject())} == {"ok"}
    known = software.installed
    played = {"numpy": "2.0.1", "torch": "2.12.1+cpu", "monai": None}
    monkeypatch.setattr(software, "installed", lambda name: played.get(name, known(name)))
    found = software.versions(Subject())
    only(found, "warn", "numpy is 2.0.1, tested is 1.26.4")
    only(found, "fail", "monai", "is not installed")


def test_pins_are_the_same_without_a_checkout(monkeypatch):
    with_file = software.pins()
    assert with_file["numpy"] == "1.26.4" and len(with_file) > 20
    requires = [f"{name}=={pin}" for name, pin in with_file.items()] + ['pytest==9.2.0; extra == "dev"']
    monkeypatch.setattr(software.Path, "is_file", lambda path: False)
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: requires)
    assert software.pins() == with_file


def test_packaged_weights_are_compared_with_their_cards(tmp_path, monkeypatch):
    assert {f.status for f in weights.packaged(Subject())} == {"ok"}
    folder = tmp_path / "weights"
    shutil.copytree(weights.PACKAGED, folder)
    monkeypatch.setattr(weights, "PACKAGED", folder)
    with (folder / "bundled.safetensors").open("r+b") as file:
        file.write(b"x")
    (folder / "sam_tiny.safetensors").unlink()
    found = weights.packaged(Subject())
    assert [f.status for f in found] == ["fail", "fail"]
    assert "SHA-256" in found[0].text and "is not there" in found[1].text


def test_a_checkpoint_must_be_there_and_be_the_published_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLOOP_WEIGHTS", str(tmp_path))
    project = doctor._project(_arguments(engine="mobile_sam"))[0]
    subject = Subject(project=project)
    missing = only(weights.engine(subject), "fail", "mobile_sam", "is not there")
    assert "samloop weights fetch mobile_sam" in missing.remedy
    entry = CATALOG["mobile_sam"]
    with (tmp_path / entry.file).open("wb") as file:
        file.truncate(entry.size)
    only(weights.engine(subject), "fail", "SHA-256")
    own = tmp_path / "own.pt"
    own.write_bytes(b"mine")
    only(
        weights.engine(Subject(project=doctor._project(_arguments(engine="mobile_sam", weights=own))[0])),
        "warn",
    )


def test_caches_are_told(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    monkeypatch.setenv("SAMLOOP_WEIGHTS", str(folder))
    assert {f.status for f in weights.caches(Subject(home=tmp_path))} == {"ok"}
    folder.mkdir()
    (folder / "mobile_sam.pt.part").write_bytes(b"x")
    only(weights.caches(Subject(home=tmp_path)), "warn", "mobile_sam.pt.part")
    monkeypatch.setenv("SAMLOOP_WEIGHTS", str(folder / "mobile_sam.pt.part"))
    only(weights.caches(Subject(home=tmp_path)), "fail", "is a file")


def test_a_token_must_be_readable_long_and_private(tmp_path, monkeypatch):
    for name in ("SAMLOOP_TOKEN", "SAMLOOP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    only(network.token(Subject()), "ok", "none")
    only(network.token(Subject(token_file=file)), "fail", "cannot be read")
    file.write_text("short")
    only(network.token(Subject(token_file=file)), "fail", "5 characters")
    secret = "a-token-of-some-length-0123"
    file.write_text(secret)
    file.chmod(0o644)
    monkeypatch.setenv("SAMLOOP_TOKEN_FILE", str(file))
    assert "chmod 600" in only(network.token(Subject()), "warn", "others can read").remedy
    file.chmod(0o600)
    only(network.token(Subject()), "ok", "27 characters")
    assert secret not in repr(network.token(Subject()))


@contextlib.contextmanager
def answering(reply):
    """An HTTP server; ``reply`` gives (status, body) for (method, path)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            status, body = reply(self.command, self.path, self.headers)
            self.send_response(status)
            self.send_header("content-type", "application/dicom+json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_a_port_is_free_or_somebody_elses_or_samloops():
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    only(network.port(Subject(port=number)), "ok", "is free")
    with answering(lambda *_: (200, b"[]")) as number:
        only(network.port(Subject(port=number)), "warn", "cannot be listened on")
    with answering(lambda method, path, _: (200, b'{"status":"ok"}')) as number:
        only(network.port(Subject(port=number)), "ok", "as samloop does")


SERIES = {"0020000E": {"Value": ["1.2.3"]}, "0020000D": {"Value": ["1.2"]}, "00080060": {"Value": ["CT"]}}


@pytest.fixture
def pacs(monkeypatch):
    """A function that looks at a PACS that answers searches, and storing, with some status."""
    from monailabel.config import settings

    def see(*, search=200, store=200, rows=(SERIES,), user="", date=None):
        monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_USERNAME", user)
        monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_PASSWORD", "secret" if user else "")
        asked = []

        def reply(method, path, headers):
            asked.append((method, path.partition("?")[0], headers.get("authorization")))
            return (store, b"") if method == "POST" else (search, json.dumps(list(rows)).encode())

        with answering(reply) as port:
            found = network.pacs(Subject(studies=f"http://127.0.0.1:{port}/dicom-web"))
        return found, asked

    return see


def test_a_pacs_that_answers_lists_and_stores(pacs):
    found, asked = pacs(user="samloop")
    assert {f.status for f in found} == {"ok"}
    assert any("answers as samloop" in text for text in told(found))
    assert any("1 series (1 CT)" in text for text in told(found))
    assert ("POST", "/dicom-web/studies") in {(method, path) for method, path, _ in asked}
    assert all(authorization for *_, authorization in asked)


def test_a_pacs_that_refuses_is_empty_or_is_not_there(pacs):
    refused = only(pacs(search=401)[0], "fail", "without a user", "401")
    assert "MONAI_LABEL_DICOMWEB_USERNAME" in refused.remedy
    only(pacs(search=404)[0], "fail", "404")
    only(pacs(rows=())[0], "warn", "no series")
    only(pacs(store=403)[0], "warn", "pacs storing", "403")
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/dicom-web"
    only(network.pacs(Subject(studies=url)), "fail", "does not answer")


def test_clocks_that_differ_are_told():
    assert network._skew(None) == network._skew("no date") == 0
    assert network._skew("Thu, 01 Jan 2015 00:00:00 GMT") > 86400


def test_what_waits_for_the_pacs_is_counted(tmp_path):
    subject = Subject(studies="http://pacs.example/dicom-web", home=tmp_path)
    only(network.outbox(subject), "ok")
    waiting = tmp_path / "pacs" / "outbox"
    waiting.mkdir(parents=True)
    (waiting / "1.2.3@00000000000000000001").touch()
    (waiting / ".lock").touch()
    only(network.outbox(subject), "warn", "1 accepted labels wait", "1.2.3")


def test_cores_and_memory_of_a_container(tmp_path, monkeypatch):
    limit = tmp_path / "cpu.max"
    limit.write_text("50000 100000\n")
    assert machine._quota(limit) == 0.5
    limit.write_text("max 100000\n")
    assert machine._quota(limit) is None and machine._quota(tmp_path / "none") is None
    project = load_project()
    monkeypatch.setattr(machine, "_quota", lambda: 0.5)
    only(machine.cores(Subject(project=project)), "warn", "may use 0.5")
    monkeypatch.setattr(machine, "_quota", lambda: None)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0})
    only(machine.cores(Subject(project=project)), "warn", "2 inferences at once")
    for free, status in ((1 << 20, "fail"), (3 << 20, "warn"), (64 << 20, "ok")):
        monkeypatch.setattr(
            machine,
            "_read",
            lambda path, free=free: f"MemAvailable: {free} kB\n" if "meminfo" in str(path) else "",
        )
        only(machine.memory(Subject(project=project)), status, "GB to be had")


def test_an_nvidia_gpu_that_torch_cannot_use_is_told(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    only(machine.gpu(Subject(project=load_project())), "ok", "none")
    monkeypatch.setattr(machine, "_driver", lambda: "550.1")
    assert machine.gpu(Subject())[0].status == "warn"


def test_temporary_files_and_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    assert any("cannot be written" in text for text in told(machine.disks(Subject()), "fail"))
    only(machine.clock(Subject()), "ok")
    monkeypatch.setattr(machine.time, "time", lambda: 0.0)
    only(machine.clock(Subject()), "fail", "files are newer")


def test_a_check_that_breaks_or_hangs_is_a_finding_and_the_others_go_on():
    stop = threading.Event()

    def breaks(_):
        raise RuntimeError("on purpose")

    def hangs(_):
        stop.wait()

    def works(_):
        return [finding.ok("works", "well")]

    try:
        found = doctor.examine([breaks, hangs, works], Subject(), seconds=0.2)
    finally:
        stop.set()
    assert [f.status for f in found] == ["fail", "fail", "ok"]
    assert "RuntimeError: on purpose" in found[0].text and found[0].check == "breaks"
    assert "no result within 0.2 s" in found[1].text


def _arguments(**given):
    known = {"project": None, "engine": None, "weights": None, "runtime": None}
    return argparse.Namespace(**{**known, **given})


def test_a_project_file_that_cannot_be_used_is_a_finding(tmp_path):
    (tmp_path / "my.yaml").write_text("labels: 5\n")
    project, found = doctor._project(_arguments(project=tmp_path / "my.yaml"))
    assert project is None and found.status == "fail" and "labels" in found.text


def test_the_command_prints_json_and_its_exit_status_says_whether_something_fails(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = str(free.getsockname()[1])
    assert cli.main(["doctor", "--studies", str(tmp_path / "none"), "--port", number, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert any(f["status"] == "fail" and "there is no folder" in f["text"] for f in told["findings"])
    (tmp_path / "bad.yaml").write_text("labels: 5\n")
    assert cli.main(["doctor", "--project", str(tmp_path / "bad.yaml"), "--port", number]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fail  project: labels") and lines[1].startswith("      -> ")


def test_it_needs_neither_the_server_nor_what_it_imports():
    """MONAI takes 20 s to import on a busy computer."""
    code = (
        "import sys, apps.samloop.doctor, apps.samloop.home;"
        "from apps.samloop.checks import store, network, weights; sys.exit('monai' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(doctor.__file__).parents[2])
