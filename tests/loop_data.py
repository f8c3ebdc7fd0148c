"""Tiny labelled images for the tests of the loop: a bright disc at a random place on a dark ground."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from sam_infer.intensity import EIGHT_BIT
from trainers.basis import Basis


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors are faster on one thread, and a busy machine does not slow the tests down so much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def window_for(image, request):
    return EIGHT_BIT


def basis(model_dir, labels, **kwargs):
    """What trainers stand on, for images of 48 pixels."""
    return Basis(model_dir=model_dir, labels=labels, window_for=window_for, **{"size": 48, **kwargs})


def disc(seed, *, width=48, height=48, radius=9, bright=200):
    """(H, W) uint8 image and its (H, W) bool mask."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    rows, columns = np.mgrid[:height, :width]
    mask = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    image = rng.normal(60, 12, (height, width)) + mask * (bright - 60)
    return np.clip(image, 0, 255).astype(np.uint8), mask


class Folder:
    """A datastore of PNG files with the methods that the loop uses."""

    def __init__(self, root: Path):
        self.root = root
        self.info = {}
        for name in ("images", "labels"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def add(self, name, image, label=None):
        PilImage.fromarray(image).save(self.root / "images" / f"{name}.png")
        if label is not None:
            PilImage.fromarray(label.astype(np.uint8)).save(self.root / "labels" / f"{name}.png")

    def add_disc(self, name, seed, *, value=1, accepted=True, **kwargs):
        image, mask = disc(seed, **kwargs)
        self.add(name, image, mask * value if accepted else None)

    def datalist(self):
        return [
            {"image": str(self.root / "images" / label.name), "label": str(label)}
            for label in sorted((self.root / "labels").iterdir())
        ]

    def get_unlabeled_images(self, label_tag=None, labels=None):
        done = {p.stem for p in (self.root / "labels").iterdir()}
        return [p.stem for p in (self.root / "images").iterdir() if p.stem not in done]

    def get_image_uri(self, image_id):
        return str(self.root / "images" / f"{image_id}.png")

    def get_image_info(self, image_id):
        return self.info.get(image_id, {})

    def get_label_uri(self, label_id, label_tag):
        path = self.root / label_tag / f"{label_id}.png"
        return str(path) if path.exists() else ""

    def get_label_info(self, label_id, label_tag):
        return json.loads((self.root / "info" / label_tag / f"{label_id}.json").read_text())

    def save_label(self, image_id, label_filename, label_tag, label_info):
        path = self.root / label_tag / f"{image_id}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Path(label_filename).read_bytes())
        info = self.root / "info" / label_tag / f"{image_id}.json"
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(label_info))
        return image_id
