"""What `samloop serve` sets up before the server starts, and what it says."""

import argparse
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps.samloop import serve
from sam_infer.errors import InputError


@pytest.fixture
def started(monkeypatch, capsys):
    """A function that runs `serve` up to the point where it would listen; gives what it printed."""
    import apps.samloop.server  # noqa: F401 - it must not see what is put in the application's place below

    known = {"total": 2}
    instance = SimpleNamespace(
        datastore=lambda: SimpleNamespace(status=lambda: known),
        home=Path("/data/home"),
        project=SimpleNamespace(labels={"liver": 1, "spleen": 2}, device="cpu"),
        encoder=SimpleNamespace(engine=SimpleNamespace(name="bundled", fingerprint="0123456789abcdef")),
        info=lambda: {"train_stats": {"unet": {"best_metric": 0.5}}},
    )
    monkeypatch.setattr("monailabel.interfaces.utils.app.app_instance", lambda: instance)
    app = SimpleNamespace(state=SimpleNamespace(lifecycle=SimpleNamespace(failure=None)))
    monkeypatch.setattr("apps.samloop.server.create_app", lambda access: app)
    monkeypatch.setattr("apps.samloop.observe.configure", lambda log_format: None)
    monkeypatch.setattr(serve, "check_address", lambda host, port: None)
    monkeypatch.setattr("apps.samloop.lifecycle.GracefulServer.run", lambda server: None)
    for name in list(serve.settings_of(studies="", conf={}, port=1)):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", "")

    def run(studies, **status):
        known.update(status)
        commands = argparse.ArgumentParser().add_subparsers()
        serve.add_parser(commands)
        serve.run(commands.choices["serve"].parse_args(["--studies", studies, "--port", "8123"]))
        return capsys.readouterr().out

    return run


def test_greeting_names_what_answers(started, tmp_path):
    local = started(str(tmp_path))
    assert f"samloop serves 2 images from {tmp_path}" in local
    assert "  browser    http://localhost:8123/\n" in local
    assert "/docs" not in local and "ohif" not in local
    remote = started("http://pacs.example/dicom-web")
    assert "  browser    http://localhost:8123/\n  OHIF       http://localhost:8123/ohif/\n" in remote
    assert "  data       /data/home\n" in remote and "data" not in local and "PACS" not in remote
    down = started("http://pacs.example/dicom-web", unavailable="the DICOMweb server x: no answer")
    assert "  PACS       the DICOMweb server x: no answer\n" in down


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_taken_address_is_refused_before_anything_is_loaded(tmp_path, host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} on this computer")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"{host}:{port}.*choose another --port"):
            serve.run(SimpleNamespace(studies=str(tmp_path), samples=False, host=host, port=port))
    serve.check_address(host, port)


def test_an_impossible_port_is_refused():
    with pytest.raises(InputError, match=r"99999.*choose another --port"):
        serve.check_address("127.0.0.1", 99999)


def test_settings_are_monai_labels():
    from monailabel.config import Settings

    found = serve.settings_of(studies="http://pacs.example/dicom-web", conf={}, port=8000)
    assert set(found) <= set(Settings.model_fields)


HOARD = """
import sys, threading
from bench.proc import resident_memory
if sys.argv[1] == "give":
    from apps.samloop.serve import give_back_memory
    give_back_memory()
import os, numpy as np
np.ones(30 << 20, np.uint8)  # glibc keeps what is smaller from now on
def work():
    held = [np.ones(20 << 20, np.uint8) for _ in range(2)]
    together.wait()
    del held
    together.wait()
together = threading.Barrier(9)
before = resident_memory(os.getpid())
for _ in range(8):
    threading.Thread(target=work).start()
together.wait()
together.wait()
print(resident_memory(os.getpid()) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to return memory")
def test_what_many_threads_freed_is_returned():
    root = Path(__file__).resolve().parents[1]
    held = [
        int(
            subprocess.run(
                [sys.executable, "-c", HOARD, how], cwd=root, capture_output=True, check=True
            ).stdout
        )
        for how in ("keep", "give")
    ]
    assert held[1] < held[0] / 2
