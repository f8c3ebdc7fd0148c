"""What `samloop serve` sets up before the server starts, and what it says."""

import os
import platform
import shutil
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
    instance = SimpleNamespace(
        datastore=lambda: SimpleNamespace(list_images=lambda: ["a", "b"]),
        project=SimpleNamespace(labels={"liver": 1, "spleen": 2}, device="cpu"),
        encoder=SimpleNamespace(engine=SimpleNamespace(name="bundled", fingerprint="0123456789abcdef")),
        info=lambda: {"train_stats": {"unet": {"best_metric": 0.5}}},
    )
    monkeypatch.setattr("monailabel.interfaces.utils.app.app_instance", lambda: instance)
    monkeypatch.setattr("apps.samloop.server.create_app", lambda: None)
    monkeypatch.setattr(serve, "check_address", lambda host, port: None)
    monkeypatch.setattr("uvicorn.run", lambda *args, **kwargs: None)
    for name in list(serve.settings_of(studies="", conf={}, port=1)):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", "")

    def run(studies):
        args = dict.fromkeys(("project", "labels", "engine", "weights", "runtime"))
        serve.run(SimpleNamespace(studies=studies, samples=False, host="127.0.0.1", port=8123, **args))
        return capsys.readouterr().out

    return run


def test_greeting_names_what_answers(started, tmp_path):
    local = started(str(tmp_path))
    assert f"samloop serves 2 images from {tmp_path}" in local
    assert "  browser    http://localhost:8123/\n" in local
    assert "/docs" not in local and "ohif" not in local
    remote = started("http://pacs.example/dicom-web")
    assert "  browser    http://localhost:8123/\n  OHIF       http://localhost:8123/ohif/\n" in remote


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


def test_tools_beside_the_interpreter_are_found_also_by_child_processes(started, tmp_path):
    assert shutil.which("itkimage2segimage") is None
    started(str(tmp_path))
    tool = shutil.which("itkimage2segimage")
    assert tool == str(Path(sys.executable).parent / "itkimage2segimage")
    assert os.environ["PATH"].endswith("/usr/bin:/bin")
    code = "import shutil; print(shutil.which('itkimage2segimage'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == tool


def test_the_case_list_of_a_dicomweb_server_does_not_go_stale():
    from monailabel.config import Settings

    found = serve.settings_of(studies="http://pacs.example/dicom-web", conf={}, port=8000)
    assert set(found) <= set(Settings.model_fields)
    assert int(found["MONAI_LABEL_DICOMWEB_CACHE_EXPIRY"]) <= 1 < 7200


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
