"""The server with SAM 2.1 from a checkpoint file of random weights: masks mean nothing, answers come."""

import json

import numpy as np
import pytest
import requests
from requests_toolbelt.multipart.decoder import MultipartDecoder

from tests.conftest import serving
from tests.sam2_nets import save_random_sam2
from trainers.phantoms import write_phantoms

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    studies, scratch = tmp_path_factory.mktemp("studies"), tmp_path_factory.mktemp("scratch")
    write_phantoms(studies, count=1, shape=(64, 64, 16))
    file = save_random_sam2(scratch / "sam2.pt")
    with serving(studies, scratch, "--engine", "sam2.1_tiny", "--weights", str(file)) as url:
        yield url


@pytest.mark.parametrize("model", ["sam_click_2d", "sam_click_3d"])
def test_clicks_are_answered(url, model):
    image = next(iter(requests.get(f"{url}/datastore/?output=all", timeout=60).json()["objects"]))
    request = {"foreground": [[32, 32, 8]], "result_extension": ".nrrd", "roi": [10, 50, 10, 50, 7, 9]}
    reply = requests.post(
        f"{url}/infer/{model}?image={image}", data={"params": json.dumps(request)}, timeout=600
    )
    assert reply.status_code == 200, reply.text
    parts = {
        part.headers[b"Content-Disposition"].split(b'"')[1]: part
        for part in MultipartDecoder.from_response(reply).parts
    }
    params = json.loads(parts[b"params"].text)
    assert 0 < params["score"] <= 1
    assert np.isfinite(params["latencies"]["total"])
    assert parts[b"image"].content.startswith(b"NRRD")
    if model == "sam_click_3d":
        assert len(params["propagation"]) == 2, "in both directions, one slice each"
