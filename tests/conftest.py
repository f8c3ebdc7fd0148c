"""What several tests share: where the labelled sets lie, and small images made inline."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from tests.orthanc import orthanc, pacs  # noqa: F401 - fixtures of every file that names them

#: Real labelled sets, beside the checkout; SAMLOOP_DATA names another folder.
DATA = Path(os.environ.get("SAMLOOP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def one_thread():
    """Threads of torch that wait for each other are slow on a busy machine, and order sums differently."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def real_set():
    """A function that gives the folder of a labelled set by name, or skips, naming it."""

    def find(name: str) -> Path:
        folder = DATA / name
        if not folder.is_dir():
            pytest.skip(f"labelled set {name} is not there ({DATA} or SAMLOOP_DATA)")
        return folder

    return find


def disc(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """(H, W) bool: a filled disc with its centre at (x, y)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """(I, J, K) bool: a filled ball with its centre at voxel (i, j, k)."""
    i, j, k = np.indices(shape)
    return (i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (k - centre[2]) ** 2 <= radius**2


def save_png(path: Path, image: np.ndarray) -> Path:
    """Write (H, W) or (H, W, 3) uint8 as PNG."""
    PilImage.fromarray(image).save(path)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The application in this process, over a small store and an engine that is right by eye.

    Gives (client, studies folder, engine); ``ct`` is a volume (24, 20, 6) with a bright block, ``photo`` a
    picture of 30 columns and 18 rows with a bright block.
    """
    import nibabel as nib
    from fastapi.testclient import TestClient
    from monailabel.config import settings
    from monailabel.interfaces.utils.app import clear_cache

    import sam_infer.engines.registry as registry
    from apps.samloop import serve
    from tests.fakes import ThresholdEngine

    studies = tmp_path_factory.mktemp("studies")
    hu = np.full((24, 20, 6), -1000, np.int16)
    hu[4:10, 5:9, 1:5] = 200
    nib.save(nib.Nifti1Image(hu, np.diag([1, 1, 2, 1])), studies / "ct.nii.gz")
    grey = np.full((18, 30), 20, np.uint8)
    grey[3:7, 20:26] = 220
    save_png(studies / "photo.png", grey)
    engine = ThresholdEngine()
    patch = pytest.MonkeyPatch()
    create = registry.create_engine
    patch.setattr(
        registry, "create_engine", lambda name, **how: engine if name == "bundled" else create(name, **how)
    )
    conf = {"labels": "liver,spleen,aorta"}
    for name, value in serve.settings_of(studies=str(studies), conf=conf, port=8000).items():
        patch.setenv(name, value)
    patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    for name, value in (
        ("APP_DIR", str(Path(serve.__file__).parent)),
        ("STUDIES", str(studies)),
        ("APP_CONF", conf),
    ):
        patch.setattr(settings, f"MONAI_LABEL_{name}", value)
    patch.setattr(settings, "MONAI_LABEL_AUTO_UPDATE_SCORING", False)
    patch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path_factory.mktemp("sessions")))
    clear_cache()
    from apps.samloop.server import create_app

    with TestClient(create_app(), raise_server_exceptions=False) as client:
        while client.get("/ready").json()["checks"]["engine"] != "ok":
            pass
        yield client, studies, engine
    clear_cache()
    patch.undo()


@pytest.fixture
def entered(served):
    """A function that gives a client of the same application behind other rules."""
    from fastapi.testclient import TestClient

    from apps.samloop.access import Access
    from apps.samloop.server import create_app

    def enter(client=("10.1.2.3", 5), **rules):
        app = create_app(Access(**{"keep_free": 0, **rules}))
        return TestClient(app, client=client, follow_redirects=False, raise_server_exceptions=False)

    return enter


@contextmanager
def serving(studies: Path, scratch: Path, *options: str):
    """`samloop serve` in a process of its own, started in an empty folder; gives its url once it answers."""
    with server_process(studies, scratch, *options) as (url, _):
        yield url


@contextmanager
def server_process(studies: Path, scratch: Path, *options: str, env=None, command=("-m", "apps.samloop.cli")):
    """As `serving`; gives (url, process), and ``server.log`` in the folder holds what it says.

    ``env`` is added to the environment; ``command`` is what Python runs in place of samloop.
    """
    import socket
    import subprocess
    import sys
    import time

    import requests

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "serve", "--studies", str(studies), "--port", str(port), *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=scratch,
            env={**os.environ, **(env or {})},
        )
        url = f"{'https' if '--certfile' in options else 'http'}://127.0.0.1:{port}"
        try:
            for _ in range(3000):
                try:
                    found = requests.get(f"{url}/ready", timeout=5, verify=False).json()
                    if found["checks"]["engine"] == "ok":
                        break
                    time.sleep(0.1)
                except requests.RequestException:
                    assert process.poll() is None, f"the server ended: {Path(log.name).read_text()}"
                    time.sleep(0.2)
            else:
                pytest.fail("the server does not answer")
            yield url, process
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def live_server(tmp_path_factory):
    """`samloop serve` in a process of its own over small phantoms and pictures; gives (url, studies)."""
    from trainers.phantoms import write_phantoms

    studies = tmp_path_factory.mktemp("live")
    write_phantoms(studies, count=2, shape=(64, 64, 16))
    rng = np.random.default_rng(0)
    (studies / "truth").mkdir(exist_ok=True)
    for n in range(10):
        mask = disc((72, 96), (rng.uniform(25, 70), rng.uniform(20, 50)), rng.uniform(10, 16))
        grey = np.clip(np.where(mask, 170, 70) + rng.normal(0, 12, mask.shape), 0, 255).astype(np.uint8)
        save_png(studies / f"photo_{n}.png", grey)
        save_png(studies / "truth" / f"photo_{n}.png", mask.astype(np.uint8))
    with serving(studies, tmp_path_factory.mktemp("elsewhere")) as url:
        yield url, studies
