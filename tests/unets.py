"""U-Net files whose answers are known without training."""

import torch

from sam_infer.networks.unet import UnetModel, build_unet, save_unet


def constant_unet(path, labels, *, winner=1, rounds=1):
    """A weights file that gives every pixel the ``winner``-th label; returns its fingerprint."""
    network = build_unet(labels=len(labels))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        last = [p for p in network.parameters() if p.shape == (len(labels) + 1,)][-1]
        last[winner] = 5.0
    model = UnetModel(network=network.eval(), labels=labels, size=32, training={"round": rounds})
    return save_unet(path, model)[:16]
