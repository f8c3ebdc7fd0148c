"""A real PACS for tests: Orthanc with DICOMweb, on a free port, over a folder of its own."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from apps.samloop.pacs.multipart import multipart_body

PROGRAM = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@dataclass
class Orthanc:
    """A running Orthanc.

    Args:
        folder: Its storage, configuration and log.
        port: Where it listens.
        users: Name -> password of those who may ask; empty = anyone.
    """

    folder: Path
    port: int
    users: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    @property
    def root(self) -> str:
        """Of Orthanc's own interface."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The DICOMweb root."""
        return f"{self.root}/dicom-web"

    @property
    def auth(self) -> tuple[str, str] | None:
        """A user who may ask."""
        return next(iter(self.users.items()), None)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {
            "Name": "tests",
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": bool(self.users),
            "RegisteredUsers": self.users,
            "DicomServerEnabled": False,
            "OverwriteInstances": True,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Host": "127.0.0.1", "Ssl": False},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "orthanc.json").write_text(json.dumps(settings))
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [PROGRAM, str(self.folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
            )
        for _ in range(600):
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                requests.get(f"{self.root}/system", auth=self.auth, timeout=1).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.05)
        pytest.fail("Orthanc does not answer")

    def stop(self) -> None:
        """Stop it; what it stores stays."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within this it takes connections and never answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stow(self, files: Iterable[Path | bytes]) -> None:
        """Store DICOM files."""
        for file in files:
            content = file if isinstance(file, bytes) else file.read_bytes()
            body, kind = multipart_body(content, uuid.uuid4().hex)
            headers = {"Content-Type": kind, "Accept": "application/dicom+json"}
            answer = requests.post(f"{self.url}/studies", body, headers=headers, auth=self.auth, timeout=30)
            answer.raise_for_status()

    def series(self, **filters: str) -> list[dict[str, Any]]:
        """Series as QIDO lists them."""
        answer = requests.get(f"{self.url}/series", params=filters, auth=self.auth, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def uids(self, **filters: str) -> list[str]:
        """SeriesInstanceUIDs of those."""
        return [row["0020000E"]["Value"][0] for row in self.series(**filters)]

    def file(self, series: str) -> bytes:
        """The only DICOM file of a series."""
        (found,) = self._find("Series", SeriesInstanceUID=series)
        instance = requests.get(f"{self.root}/series/{found}", auth=self.auth, timeout=30).json()[
            "Instances"
        ][0]
        return requests.get(f"{self.root}/instances/{instance}/file", auth=self.auth, timeout=30).content

    def delete(self, series: str) -> None:
        """Delete a series."""
        for found in self._find("Series", SeriesInstanceUID=series):
            answer = requests.delete(f"{self.root}/series/{found}", auth=self.auth, timeout=30)
            answer.raise_for_status()

    def _find(self, level: str, **query: str) -> list[str]:
        asked = {"Level": level, "Query": query}
        answer = requests.post(f"{self.root}/tools/find", json=asked, auth=self.auth, timeout=30)
        answer.raise_for_status()
        return answer.json()


@contextmanager
def running_orthanc(folder: Path, users: dict[str, str] | None = None) -> Iterator[Orthanc]:
    """Start an Orthanc over a folder; it is stopped at the end. Skips where it is not installed."""
    if not Path(PROGRAM).is_file() or not PLUGIN.is_file():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Orthanc(folder=folder, port=port, users=users or {})
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc for the tests of a file, empty at first."""
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as found:
        yield found


@pytest.fixture
def pacs(orthanc: Orthanc) -> Orthanc:
    """An empty PACS."""
    for uid in orthanc.uids():
        orthanc.delete(uid)
    return orthanc
