"""A trivial application for stock MONAI Label: a threshold, a trainer that waits, the next case at random.

So little runs in it that what is measured is MONAI Label itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import servers

#: Its only model and its only trainer.
MODEL, TRAINER = "threshold", "wait"
MAIN = """
import time

from monai.transforms import Compose, LoadImaged
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.basic_infer import BasicInferTask


class Bright:
    def __call__(self, data):
        data["pred"] = (data["image"] > 100).byte()
        return data


class Threshold(BasicInferTask):
    def __init__(self):
        super().__init__(None, None, "segmentation", {"bright": 1}, 3, "voxels above 100")

    def is_valid(self):
        return True

    def _get_network(self, device, data):
        return None

    def pre_transforms(self, data=None):
        return [LoadImaged(keys="image")]

    def inferer(self, data=None):
        return Compose([Bright()])

    def post_transforms(self, data=None):
        return []


class Wait(TrainTask):
    def __init__(self):
        super().__init__("waits, where there are labels")

    def config(self):
        return {"seconds": 600}

    def __call__(self, request, datastore):
        if not datastore.datalist():
            raise ValueError("no labels to train on")
        time.sleep(float(request.get("seconds", 600)))


class Trivial(MONAILabelApp):
    def __init__(self, app_dir, studies, conf):
        super().__init__(app_dir, studies, conf, name="trivial", description="a threshold")

    def init_infers(self):
        return {"threshold": Threshold()}

    def init_trainers(self):
        return {"wait": Wait()}

    def init_strategies(self):
        return {"random": Random()}
"""


@contextmanager
def serving(studies: str, folder: Path, log: Path, *, tools: bool = True) -> Iterator[servers.Server]:
    """Stock MONAI Label with the trivial application, started as its documentation says.

    Args:
        studies: Folder of images, or the URL of a DICOMweb server.
        folder: Of this server alone: its application and its cache.
        log: Receives what it prints.
        tools: Whether dcmqi's programs are on the PATH.
    """
    app = folder / "app"
    app.mkdir(parents=True, exist_ok=True)
    (app / "main.py").write_text(MAIN)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app)]
    command += ["--studies", studies, "--host", "127.0.0.1"]
    settings = {
        "MONAI_LABEL_DATASTORE_CACHE_PATH": str(folder / "cache"),
        "MONAI_LABEL_SESSION_PATH": str(folder / "sessions"),
        "MONAI_LABEL_TRACKING_ENABLED": "false",
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "HOME": str(folder),
    }
    if not tools:
        settings["PATH"] = os.defpath
    with servers.running(command, log, settings) as server:
        yield server
