"""A tiny CLIP of open_clip's own classes, and scenes of two shapes of which a caption names one."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

SIDE = 64
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIDE, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SHAPES = ("bright disc", "dark square", "striped cross")


def build(config=CONFIG, seed=0):
    import open_clip

    torch.manual_seed(seed)
    return open_clip.model.CLIP(**json.loads(json.dumps(config)))


def save(folder, network, config=CONFIG):
    """As open_clip publishes a model."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def drawn(shape, x, y, side=SIDE, radius=10):
    """(side, side) bool."""
    rows, columns = np.mgrid[:side, :side]
    dx, dy = abs(columns - x), abs(rows - y)
    if shape == "bright disc":
        return dx**2 + dy**2 <= radius**2
    if shape == "dark square":
        return np.maximum(dx, dy) <= radius - 1
    return (np.minimum(dx, dy) <= 5) & (np.maximum(dx, dy) <= radius)


def scene(rng, count=2):
    """(SIDE, SIDE) float32 in 0..1, and by name the masks of its shapes, one to a half of the image."""
    names = rng.permutation(SHAPES)[:count]
    image = rng.normal(0.4, 0.04, (SIDE, SIDE))
    stripes = np.where(np.arange(SIDE) // 2 % 2, 0.9, 0.0) * np.ones((SIDE, 1))
    masks = {}
    turned = rng.random() < 0.5
    for name, centre in zip(names, rng.permutation((16, 48)), strict=False):
        x, y = centre + rng.uniform(-5, 5), rng.uniform(11, SIDE - 11)
        mask = drawn(name, *((y, x) if turned else (x, y)))
        image[mask] = stripes[mask] if "striped" in name else 0.9 if "bright" in name else 0.05
        masks[str(name)] = mask
    return np.clip(image, 0, 1).astype(np.float32), masks


@cache
def trained_folder(folder: Path, steps=130, batch=48):
    """A folder with a network that was shown scenes with captions that name one of their two shapes."""
    import open_clip

    network = build().train()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    tokens = tokenizer([f"a {name}" for name in SHAPES])
    rng = np.random.default_rng(0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        scenes = [scene(rng, 1 + int(rng.random() < 0.5)) for _ in range(batch)]
        images = torch.from_numpy(np.stack([one[0] for one in scenes]))[:, None].repeat(1, 3, 1, 1)
        there = torch.tensor([[float(name in one[1]) for name in SHAPES] for one in scenes])
        found = network.encode_image((images - 0.5) / 0.25, normalize=True)
        logits = network.logit_scale.exp() * found @ network.encode_text(tokens, normalize=True).T
        loss = torch.nn.functional.cross_entropy(logits, there / there.sum(1, keepdim=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return save(folder, network.eval())
