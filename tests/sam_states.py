"""State dicts made from tables of names and shapes, so that networks are tested without their weights."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).with_name("fixtures")
#: A prime, so that no row of a parameter repeats another.
PERIOD = 4099


def table(name):
    """The parameters of a network of another project: {name: shape}, and what it answered; see `made`."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def empty(shapes):
    """Zeros of these shapes that take up four bytes each, in memory and on disk."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def made(shapes):
    """Parameters of plausible size made by a formula from their names: the same on every machine."""
    return {key: torch.from_numpy(_values(key, tuple(shape))) for key, shape in shapes.items()}


def _values(key, shape):
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(PERIOD)
    values = np.resize(noise, shape).astype(np.float32)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(values)
    if len(shape) == 1:
        return 0.1 * values + key.endswith("weight")
    return values / np.float32(math.sqrt(math.prod(shape[1:])))


def picture():
    """(75, 90, 3) uint8 of smooth stripes and noise."""
    y, x = np.mgrid[:75, :90]
    stripes = 128 + 100 * np.sin(x / 7)[..., None] * np.cos(y / 9)[..., None] * np.array([1, 0.8, 0.6])
    return (stripes + np.random.RandomState(0).uniform(-20, 20, (75, 90, 3))).astype(np.uint8)
