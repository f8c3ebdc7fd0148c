"""An uncertainty map as the server sends it."""

import json

import nrrd
import numpy as np
import torch

from apps.samloop.store import HOME
from sam_infer.networks.unet import UnetModel, build_unet, save_unet
from tests.test_server import infer, parts

LABELS = {"liver": 1, "spleen": 2, "aorta": 3}


def publish(studies):
    """A network that knows nothing, so that it doubts everything."""
    torch.manual_seed(0)
    network = build_unet(labels=3, channels=(4, 8)).eval()
    model = UnetModel(network=network, labels=LABELS, size=32, channels=(4, 8))
    save_unet(studies / HOME / "models" / "unet.safetensors", model)


def array_of(content, path):
    path.write_bytes(content)
    return nrrd.read(str(path))[0]


def test_it_is_a_further_part_of_the_multipart_answer(served, tmp_path):
    client, studies, _ = served
    publish(studies)
    sent = dict(model="unet", result_extension=".nrrd", output_uncertainty=True)
    for output in ("all", None):
        found = parts(infer(client, output=output, **sent))
        assert list(found) == ["params", "image", "uncertainty"], "viewers take the first file"
        labels, doubt = (array_of(found[n], tmp_path / f"{n}.nrrd") for n in ("image", "uncertainty"))
        assert labels.shape == doubt.shape == (24, 20, 6) and doubt.dtype == np.uint8
        assert 100 < doubt.mean() <= 255
        told = json.loads(found["params"])
        assert set(told["uncertainty"]) == set(told["label_names"])
        for name, value in told["label_names"].items():
            assert abs(told["uncertainty"][name] - doubt[labels == value].mean() / 255) < 1e-3
    assert set(parts(infer(client, model="unet"))) == {"params", "image"}


def test_json_tells_its_mean_and_one_file_alone_is_refused(served):
    client, studies, _ = served
    publish(studies)
    reply = infer(client, model="unet", output="json", output_uncertainty=True).json()
    assert reply["uncertainty"] and all(0 < value <= 1 for value in reply["uncertainty"].values())
    refused = infer(client, model="unet", output="image", output_uncertainty=True)
    assert refused.status_code == 400 and "output=all" in refused.text
    assert infer(client, model="unet", output="image").status_code == 200


def test_a_model_that_makes_none_says_so(served):
    client, _, _ = served
    reply = infer(client, foreground=[[6, 6, 2]], output_uncertainty=True)
    assert reply.status_code == 400 and "no uncertainty map" in reply.text
