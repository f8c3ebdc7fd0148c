"""Whatever a client sends, to any model: an answer or a 4xx, never a 500, and no memory kept."""

import gc
import io
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as PilImage

MODELS = ("sam_click_2d", "sam_click_3d", "sam_multi", "sam_scribble", "unet")
KEYS = (
    "foreground", "background", "roi", "boxes", "lasso", "lasso_background", "slice", "mask", "label",
    "selected_label_name", "label_info", "extent", "liver", "spleen", "window_level", "window_width",
    "result_extension", "result_compress", "label_tag", "save_label",
)  # fmt: skip
NAN, INFINITE = float("nan"), float("inf")
VALUES = (
    None, "", "x", "1", True, 0, -1, 3, 1.5, 1e300, 10**400, NAN, INFINITE, "9" * 5000, [], {}, [[]], [[[]]],
    {"a": [1]}, [None], [[None]], [1, 2], [1, 2, 3], [[5, 6, 2]], [[5, 6, 2], [5, 6, 2]], [[5, 6, 2], [5, 6]],
    [[-1, 0, 0]], [[24, 0, 0]], [[1e9, 0, 0]], [[NAN, 0, 0]], [[INFINITE, 0, 0]], [["a", "b", "c"]],
    [[True, False, True]], [[5, 6, 2]] * 5000, [[[5, 6, 2]]], [[[5, 6, 2], [9, 6, 2], [9, 8, 2]]],
    [[[5, 6, 2]] * 5000], [9, 4, 8, 5, 2, 2], [9, 4, 8, 5, 2, 4], [[9, 4, 8, 5, 2, 2]],
    [[9, 4, 8, 5, 2, 2]] * 100, [{"name": "liver", "id": 1}], [{"name": "liver", "id": 10**30}],
    [{"name": ["liver"], "id": "x"}], ".nrrd", ".png", "../../x", "slices", "prompt", "background",
    "a\x00b", "\ud800", [[[[[[[[1]]]]]]]],
)  # fmt: skip
GOOD = {"foreground": [[6, 6, 2]], "liver": [[6, 6, 2]], "window_level": 100, "window_width": 200}


def nifti(array, affine=None):
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine).to_bytes()


def strokes():
    painted = np.zeros((24, 20, 6), np.uint8)
    painted[5:9, 6, 2] = 3
    return nifti(painted, np.diag([1, 1, 2, 1]))


def ask(client, model, params, *, image="ct", label=None, file=None):
    files = {}
    if label is None and model == "sam_scribble" and file is None:
        label = ("s.nii", strokes())
    if label is not None:
        files["label"] = label
    if file is not None:
        files["file"] = file
    reply = client.post(
        f"/infer/{model}",
        params={"image": "" if file else image, "output": "json"},
        data={"params": json.dumps(params)},
        files=files or None,
    )
    if reply.status_code != 200:
        assert 400 <= reply.status_code < 500, (model, str(params)[:300], reply.text)
        assert reply.json()["detail"]
    return reply


def serves_on(client):
    for model in MODELS[:-1]:
        assert ask(client, model, GOOD).status_code == 200


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def every(models, keys, values):
    for model, key, value in itertools.product(models, keys, values):
        yield model, {**GOOD, key: value}
        yield model, {key: value}


def test_any_value_under_any_key(served):
    """Every other value under every key, of the models in turn, alone or beside good prompts."""
    client, _, _ = served
    for turn, (key, value) in enumerate(itertools.product(KEYS, VALUES)):
        if turn % 2:
            params = {**GOOD, key: value} if turn % 4 == 1 else {key: value}
            ask(client, MODELS[turn // 2 % len(MODELS)], params, image=("ct", "photo")[turn % 7 == 0])
    serves_on(client)


@pytest.mark.slow
def test_any_value_under_any_key_of_any_model(served):
    client, _, _ = served
    for model, params in every(MODELS, KEYS, VALUES):
        ask(client, model, params)
    serves_on(client)


@pytest.mark.slow
def test_pairs_of_values(served):
    client, _, _ = served
    rng = np.random.default_rng(0)
    for _ in range(3000):
        chosen = rng.choice(KEYS, size=rng.integers(2, 6), replace=False)
        params = {key: VALUES[rng.integers(len(VALUES))] for key in chosen}
        ask(client, str(rng.choice(MODELS)), params, image=str(rng.choice(["ct", "photo"])))
    serves_on(client)


def volumes():
    rng = np.random.default_rng(0)
    noise = rng.integers(-1000, 1000, (12, 10, 5)).astype(np.int16)
    turned = nib.eulerangles.euler2mat(0.3, -0.5, 0.2)
    oblique = np.eye(4)
    oblique[:3, :3] = turned @ np.diag([0.7, 0.7, 3.0])
    empty = bytearray(nifti(noise))
    empty[42:44] = bytes(2)  # the first dimension
    singular = bytearray(nifti(noise, oblique))
    singular[280:328] = bytes(48)  # the three rows of the affine
    picture = io.BytesIO()
    PilImage.fromarray(rng.integers(0, 255, (9, 14, 3), np.uint8)).save(picture, "PNG")
    alpha = io.BytesIO()
    PilImage.fromarray(rng.integers(0, 255, (9, 14, 4), np.uint8)).save(alpha, "PNG")
    pixel = io.BytesIO()
    PilImage.fromarray(np.zeros((1, 1), np.uint8)).save(pixel, "PNG")
    return {
        "plain": ("a.nii", nifti(noise)),
        "one slice": ("a.nii", nifti(noise[:, :, :1])),
        "one row": ("a.nii", nifti(noise[:, :1])),
        "one voxel": ("a.nii", nifti(noise[:1, :1, :1])),
        "2D": ("a.nii", nifti(noise[:, :, 0])),
        "empty": ("a.nii", bytes(empty)),
        "4D": ("a.nii", nifti(np.stack([noise] * 3, -1))),
        "4D of one": ("a.nii", nifti(noise[..., None])),
        "5D": ("a.nii", nifti(noise[..., None, None])),
        "flipped": ("a.nii", nifti(noise, np.diag([-1, -1, -2, 1]))),
        "oblique": ("a.nii", nifti(noise, oblique)),
        "singular": ("a.nii", bytes(singular)),
        "nan": ("a.nii", nifti(np.where(noise > 0, np.nan, 1.0).astype(np.float32))),
        "constant": ("a.nii", nifti(np.zeros_like(noise))),
        "huge numbers": ("a.nii", nifti(noise.astype(np.float64) * 1e300)),
        "complex": ("a.nii", nifti(noise.astype(np.complex64))),
        "colour": ("a.png", picture.getvalue()),
        "colour with alpha": ("a.png", alpha.getvalue()),
        "one pixel": ("a.png", pixel.getvalue()),
        "garbage": ("a.nii", b"\x00\x01" * 400),
        "nothing": ("a.png", b""),
        "cut off": ("a.nii", nifti(noise)[:600]),
        "unknown kind": ("a.exe", b"MZ"),
    }


PROMPTS = (
    {"foreground": [[0, 0, 0]], "liver": [[0, 0, 0]]},
    {"foreground": [[4, 3]], "liver": [[4, 3]]},
    {"roi": [0, 5, 0, 5, 0, 0], "label": "liver"},
    {"boxes": [[0, 5, 0, 5, 0, 0]], "liver": [[4, 3, 0]]},
    {"lasso": [[[1, 1, 0], [6, 1, 0], [6, 6, 0]]], "slice": 0},
)


@pytest.mark.parametrize("name", volumes())
def test_any_image_for_any_model(served, name):
    client, _, _ = served
    file = volumes()[name]
    for model, prompts in itertools.product(MODELS, PROMPTS):
        label = file if model == "sam_scribble" else None
        ask(client, model, {**prompts, "window_level": 0, "window_width": 500}, file=file, label=label)


@pytest.mark.parametrize("name", volumes())
def test_any_label_map_for_any_model(served, name):
    client, _, _ = served
    for model in MODELS:
        ask(client, model, GOOD, label=volumes()[name])


@pytest.mark.parametrize("model", MODELS)
def test_strokes_and_masks_of_any_value(served, model):
    client, _, _ = served
    for fill in (0, 1, 2, 3, 255):
        label = ("s.nii", nifti(np.full((24, 20, 6), fill, np.uint8), np.diag([1, 1, 2, 1])))
        for params in (GOOD, {}, {"extent": "slices"}, {"mask": "prompt"}, {"roi": [0, 23, 0, 19, 0, 5]}):
            ask(client, model, params, label=label)


def test_memory_comes_back(served):
    """What repeats must not grow: after a first pass has filled the caches, more passes add nothing."""
    client, _, _ = served

    def once():
        for turn, value in enumerate(VALUES):
            ask(client, MODELS[turn % len(MODELS)], {**GOOD, KEYS[turn % 14]: value})

    once()
    once()
    before = resident()
    for _ in range(4):
        once()
    assert resident() - before < 48 << 20
