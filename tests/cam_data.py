"""Discs and bright squares on dark noise, and a classifier that learned from their presence alone."""

from functools import cache

import numpy as np
import torch

from sam_infer.networks.classifier import ClassifierModel, build_classifier
from sam_infer.networks.unet import to_square
from sam_infer.volumes import Image

LABELS = {"disc": 3, "square": 7}
#: Side of the scenes; the network sees them at twice that.
SIDE = 64
SIZE = 128


def scene(seed, *, disc=True, square=True, width=SIDE, height=SIDE):
    """(H, W) uint8 image and (H, W) uint8 label map; the objects lie in different halves, left or right."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    sides = rng.permutation(2)
    labelmap = np.zeros((height, width), np.uint8)
    image = rng.normal(45, 10, (height, width))
    for present, side, name in ((disc, sides[0], "disc"), (square, sides[1], "square")):
        x = rng.uniform(11, width / 2 - 11) + side * width / 2
        y = rng.uniform(11, height - 11)
        if not present:
            continue
        if name == "disc":
            mask, grey = (rows - y) ** 2 + (columns - x) ** 2 <= 9**2, 120
        else:
            mask, grey = np.maximum(abs(rows - y), abs(columns - x)) <= 6, 220
        labelmap[mask] = LABELS[name]
        image[mask] += grey - 45
    return np.clip(image, 0, 255).astype(np.uint8), labelmap


def presence_of(labelmap):
    return [float((labelmap == value).any()) for value in LABELS.values()]


def as_image(*slices, key=("k",)):
    """Slices (H, W) as a volume (W, H, K)."""
    return Image(array=np.stack(slices, axis=-1).swapaxes(0, 1), affine=np.eye(4), key=key, flat=False)


def four_kinds(seeds):
    return [scene(seed, disc=bool(seed & 1), square=bool(seed & 2)) for seed in seeds]


@cache
def trained(iterations=60, seed=0, channels=(8, 8, 16, 16)):
    """A model that was shown 64 scenes, with and without each object."""
    shown = four_kinds(range(1000, 1064))
    images = to_square(torch.from_numpy(np.stack([s[0] for s in shown]))[:, None].float() / 255, SIZE)
    wanted = torch.tensor([presence_of(s[1]) for s in shown])
    torch.manual_seed(seed)
    network = build_classifier(labels=2, channels=channels)
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        drawn = torch.randint(len(images), (16,), generator=generator)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images[drawn]), wanted[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return ClassifierModel(
        network=network.eval().requires_grad_(False), labels=LABELS, size=SIZE, channels=channels
    )
