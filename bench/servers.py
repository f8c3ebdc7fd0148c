"""Servers under measurement, each in a process of its own on a free port of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

#: Seconds that a server may take to answer the first request.
START_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers.

    Args:
        url: Its address.
        pid: Its process.
        start: Seconds from its start to its first answer.
    """

    url: str
    pid: int
    start: float


@contextmanager
def samloop(studies: Path | str, log: Path, arguments: Sequence[str]) -> Iterator[Server]:
    """``samloop serve`` over some studies.

    Args:
        studies: A folder, or the URL of a DICOMweb server.
        log: Receives what the server prints.
        arguments: More of the command line, such as ``--engine sam2.1_tiny``.
    """
    command = [sys.executable, "-m", "apps.samloop.cli", "serve", "--studies", str(studies), *arguments]
    with running(command, log, {}) as server:
        yield server


@contextmanager
def stock(studies: Path, folder: Path, log: Path, checkpoint: Path, config: Path) -> Iterator[Server]:
    """MONAI Label's own server with its sample app "radiology", whose task sam_2d runs a SAM 2 checkpoint.

    Started as its documentation says, but that nothing is fetched: the checkpoint and its configuration lie
    where it would download them to, and no other model brings weights.

    Args:
        studies: Folder of images.
        folder: Where the sample app is copied to.
        log: Receives what the server prints.
        checkpoint: In sam2's format.
        config: Its configuration file.

    Raises:
        FileNotFoundError: When monailabel is installed without its sample apps.
    """
    app = folder / "radiology"
    shutil.copytree(_sample_app("radiology"), app)
    (app / "model").mkdir()
    shutil.copy(checkpoint, app / "model" / checkpoint.name)
    shutil.copy(config, app / "model" / config.name)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app)]
    command += ["--studies", str(studies), "--host", "127.0.0.1"]
    for setting in ("models deepedit", "use_pretrained_model false", "scribbles false", "skip_trainers true"):
        command += ["--conf", *setting.split()]
    settings = {
        # Of these addresses only the names of the files are used: they are there already.
        "MONAI_SAM_MODEL_PT": f"http://127.0.0.1/{checkpoint.name}",
        "MONAI_SAM_MODEL_CFG": f"http://127.0.0.1/{config.name}",
        "MONAI_LABEL_DATASTORE_CACHE_PATH": str(folder / "cache"),
        "MONAI_LABEL_TRACKING_ENABLED": "false",
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    }
    with running(command, log, settings) as server:
        yield server


def _sample_app(name: str) -> Path:
    """The folder of a sample app of monailabel; pip and uv install its data to different places."""
    import monailabel

    packages = Path(monailabel.__file__).parents[1]
    places = [Path(sys.prefix) / "monailabel", *packages.glob("monailabel-*.data/data/monailabel")]
    for place in places:
        if (place / "sample-apps" / name).is_dir():
            return place / "sample-apps" / name
    raise FileNotFoundError(f"monailabel's sample app {name} is in none of {', '.join(map(str, places))}")


@contextmanager
def running(command: list[str], log: Path, settings: dict[str, str]) -> Iterator[Server]:
    """A server in a process of its own.

    Args:
        command: What starts it; ``--port`` is added.
        log: Receives what it prints; it runs in this file's folder.
        settings: More of its environment.

    Raises:
        RuntimeError: When it ends, or does not answer in `START_SECONDS`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": root, **settings}
    url, start = f"http://127.0.0.1:{port}", time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=environment,
        )
        try:
            while not _answers(url):
                if process.poll() is not None or time.perf_counter() - start > START_SECONDS:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}; see {log}")
                time.sleep(0.2)
            yield Server(url=url, pid=process.pid, start=time.perf_counter() - start)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    """Whether anything answers, with whatever status: a server whose PACS is down may have none better."""
    try:
        requests.get(f"{url}/info/", timeout=60)
    except requests.RequestException:
        return False
    return True
