"""The measurements measure: a small run of each against a live server or a small network."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench import clicks, encoder, latency
from bench.servers import Server

SHAPE = (64, 64, 16)


def waits(scale):
    return clicks.Waits(
        opened=scale,
        new_slice=[scale, 2 * scale, 3 * scale],
        repeated=[scale] * 3,
        crowd=[4 * scale] * 2,
        info=[scale, 5 * scale],
        memory=10**9,
        peak_memory=2 * 10**9,
    )


def test_clicks_are_counted_and_answered(live_server):
    url, _ = live_server
    server = Server(url=url, pid=os.getpid(), start=1.0)
    plan = clicks.Plan(
        image="phantom_000",
        shape=SHAPE,
        model="sam_click_2d",
        volume_model="sam_click_3d",
        clicks=1,
        users=2,
        compress=False,
    )
    found = clicks.measure(server, plan)
    assert [len(found.new_slice), len(found.repeated), len(found.volume), len(found.crowd)] == [1, 1, 1, 4]
    assert min(found.new_slice + found.repeated + found.volume + found.crowd + found.info) > 0
    assert found.peak_memory >= found.memory > 1 << 20
    with pytest.raises(RuntimeError, match="sam_click_9d answered 404"):
        clicks.Clicker(url, plan).click("sam_click_9d", [1, 1, 1])
    with pytest.raises(ValueError, match="8 slices are too few for 16"):
        clicks.measure(server, clicks.Plan(**{**vars(plan), "clicks": 9}))


def test_table_and_ratios():
    rows = [
        latency.Result(server=name, shape=SHAPE, compress=True, start=1.0, waits=waits(scale))
        for name, scale in (("samloop bundled", 0.1), (latency.STOCK, 4.0))
    ]
    ours = "| samloop bundled | 64x64x16 | gzip | 0.10 | 0.200 / 0.290 | 0.100 / 0.100 | - | 0.400 / 0.400 "
    assert ours + "| 0.500 | 1.00 (2.00) |\n" in latency.table(rows)
    assert "| samloop bundled | 64x64x16 | gzip | 40x | 40x | 40x | 40x |\n" in latency.ratios(rows)
    assert latency.ratios(rows[:1]) == ""


def test_volumes_are_resampled_to_the_size(tmp_path):
    import nibabel as nib

    latency.write_volume(None, (64, 48, 20), tmp_path / "volumes" / "ct.nii.gz")
    image = nib.load(tmp_path / "volumes" / "ct.nii.gz")
    assert image.shape == (64, 48, 20)
    assert image.get_data_dtype() == np.int16
    array = np.asanyarray(image.dataobj)
    assert array.min() < -900 and array.max() > 200


def test_agreement_is_that_of_masks():
    edge = np.linspace(-1, 1, 100, dtype=np.float32).reshape(1, 10, 10)
    assert encoder.mask_dice(edge, edge, random=False) == [1.0]
    assert encoder.mask_dice(-edge, edge, random=False) == [0.0]
    assert encoder.mask_dice(edge + 9, edge + 9, random=True) == [1.0]
    half = encoder.mask_dice(edge + 9, edge, random=False)
    assert half == [pytest.approx(2 * 50 / 150)]


@pytest.mark.slow
def test_encoder_bench_runs(tmp_path):
    command = [sys.executable, "-m", "bench", "encoder", "--engine", "mobile_sam", "--images", "1"]
    command += ["--threads", "1", "--runtimes", "sdpa", "--out", str(tmp_path)]
    printed = subprocess.check_output(command, text=True)
    assert "mobile_sam, random parameters, 1 images" in printed
    rows = json.loads((tmp_path / "encoder.json").read_text())
    assert list(rows) == ["upstream", "sdpa"]
    assert max(rows["sdpa"]["difference"]) < 1e-3
    assert min(rows["sdpa"]["dice"]) > 0.999
    assert rows["sdpa"]["seconds"][0] > 0
