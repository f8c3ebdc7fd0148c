"""Small cases whose masks are not what a SAM sees by itself, and a SAM small enough to learn fast."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import segment_anything.modeling as upstream
import torch

from sam_infer.candidates import CandidateSet
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.geometry import slice_image
from sam_infer.parts import Part
from sam_infer.text.labeltexts import LabelTexts, TextSettings
from sam_infer.types import Prompts
from sam_infer.volumes import read_image
from tests.conftest import disc, save_png
from tests.loop_data import Folder
from tests.test_sam_engine import small_sam

LABELS = {"halo": 5}


@cache
def small_base():
    return SamEngine(name="small", model=small_sam())


@cache
def quick_base():
    """A SAM of segment-anything's classes, so small that a step takes some milliseconds."""
    torch.manual_seed(0)
    width, grid = 32, 8
    sam = upstream.Sam(
        image_encoder=upstream.ImageEncoderViT(
            depth=1, embed_dim=16, num_heads=2, img_size=16 * grid, patch_size=16, out_chans=width
        ),
        prompt_encoder=upstream.PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(16 * grid,) * 2,
            mask_in_chans=4,
        ),
        mask_decoder=upstream.MaskDecoder(
            num_multimask_outputs=3,
            transformer=upstream.TwoWayTransformer(depth=1, embedding_dim=width, mlp_dim=32, num_heads=4),
            transformer_dim=width,
        ),
    )
    return SamEngine(name="small", model=sam.eval())


def halo(seed, *, width=48, height=40):
    """(H, W) uint8 image with a bright disc, and the (H, W) bool disc of twice its radius around it."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(16, width - 16), rng.uniform(14, height - 14)
    rows, columns = np.mgrid[:height, :width]
    away = np.hypot(rows - y, columns - x)
    image = rng.normal(60, 12, (height, width)) + 140 * (away <= 6)
    return np.clip(image, 0, 255).astype(np.uint8), away <= 12


def picture(grey):
    """An (H, W) uint8 picture as it is read from a file."""
    with tempfile.TemporaryDirectory() as folder:
        return read_image(save_png(Path(folder) / "a.png", grey))


def halo_store(root, count, *, accepted=None):
    """Cases case_0000 and so on, of which all or the first ones are accepted."""
    store = Folder(root)
    for seed in range(count):
        image, mask = halo(seed)
        given = accepted is None or seed < accepted
        store.add(f"case_{seed:04d}", image, mask * 5 if given else None)
    return store


class Bright:
    """Prompts a label with the box around what is bright on a slice; not there once ``there`` is False."""

    name = "bright"
    fingerprint = "bright-1"

    def __init__(self, label="halo"):
        self.label = label
        self.there = True

    def __call__(self):
        if not self.there:
            raise InputError("prompts", "bright", "not trained yet", status=409)
        return self

    def parts(self, image, window, k):
        part = Part.of_mask(window.apply(slice_image(image.array, k)) > 0.55)
        return {} if part is None else {self.label: part}


class Letters:
    """Embeds a text by how often each of some letters is in it."""

    name = "letters"

    def __init__(self, letters="aeinst"):
        self.letters = letters
        self.width = len(letters)
        self.fingerprint = f"letters-{letters}"

    def encode(self, texts):
        counts = np.array([[text.count(one) for one in self.letters] for text in texts], np.float32) + 0.1
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def label_texts(folder, text="a dark ring around a bright disc", *, label="halo", letters="aeinst"):
    """A sentence about one label."""
    settings = TextSettings(descriptions={label: text} if text else {})
    return LabelTexts(settings, encoder=Letters(letters), folder=folder)


def rate(preferences, case, *, size=(40, 48), label="halo", ranking=(0, 1, 2, 3), seed=0):
    """Candidates of a case, discs in one another from the largest to the smallest, ranked by ann."""
    height, width = size
    masks = np.stack([disc(size, (width / 2 + seed, height / 2), radius) for radius in (14, 11, 8, 5)])
    name = preferences.put_candidates(
        case,
        label=label,
        k=0,
        candidates=CandidateSet(masks=masks, source="masks"),
        prompts=Prompts(box=(width / 2 - 9, height / 2 - 9, width / 2 + 9, height / 2 + 9)),
        fingerprint="e-1",
    )
    return preferences.answer(name, ranking=list(ranking), who="ann")
