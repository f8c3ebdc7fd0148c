"""3D Slicer's own client module against the real server: every call that its panel makes."""

import importlib.util
import json
import site
import sys
import time
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
from PIL import Image as PilImage


def _client_module():
    roots = [Path(sys.prefix), *map(Path, site.getsitepackages())]
    pattern = "**/plugins/slicer/MONAILabel/MONAILabelLib/client.py"
    return next((p for root in roots for p in sorted(root.glob(f"monailabel*/{pattern}"))), None)


@pytest.fixture(scope="module")
def client(live_server, tmp_path_factory):
    path = _client_module()
    if path is None:
        pytest.skip("3D Slicer's client module is not among the files that monailabel installed")
    spec = importlib.util.spec_from_file_location("slicer_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    url, _ = live_server
    return module.MONAILabelClient(url, tmpdir=str(tmp_path_factory.mktemp("slicer")), client_id="user-test")


def _wait(happened, seconds=300):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


SLICER = {"result_extension": ".nrrd", "result_dtype": "uint8", "window_level": "", "window_width": ""}


def test_connect(client):
    assert client.auth_enabled() is False
    info = client.info()
    assert {"sam_click_2d", "sam_click_3d", "sam_multi", "sam_scribble", "unet"} <= set(info["models"])
    assert info["labels"][0] == "liver"


def test_next_sample(client):
    sample = client.next_sample("first", {})
    assert Path(sample["path"]).is_file()
    assert client.next_sample("random", {"seed": 3})["id"]


def test_points_on_a_slice(client, live_server):
    """A click in the middle of the liver's largest slice, as the panel sends it."""
    _, studies = live_server
    truth = np.asarray(nib.load(studies / "truth" / "phantom_000.nii.gz").dataobj) == 1
    k = int(truth.sum(axis=(0, 1)).argmax())
    from scipy import ndimage

    i, j = np.unravel_index(ndimage.distance_transform_edt(truth[:, :, k]).argmax(), truth.shape[:2])
    params = {"label": "liver", "foreground": [[int(i), int(j), k]], "background": [], "slice": k, **SLICER}
    path, result = client.infer("sam_click_2d", "phantom_000", params)
    mask = nrrd.read(path)[0]
    assert mask.shape == truth.shape
    assert result["label_names"] == {"liver": 1}
    assert result["slice"] == k
    assert mask[i, j, k] == 1
    assert mask.sum() == mask[:, :, k].sum()


def test_roi_through_the_volume(client, live_server):
    """A box around the liver on one slice, in Slicer's order with a reversed axis."""
    _, studies = live_server
    truth = np.asarray(nib.load(studies / "truth" / "phantom_000.nii.gz").dataobj) == 1
    k = int(truth.sum(axis=(0, 1)).argmax())
    i, j = np.nonzero(truth[:, :, k])
    roi = [int(i.max()), int(i.min()), int(j.min()), int(j.max()), k, k]
    path, result = client.infer("sam_click_3d", "phantom_000", {"label": "liver", "roi": roi, **SLICER})
    mask = nrrd.read(path)[0] > 0
    dice = 2 * (mask & truth)[:, :, k].sum() / (mask[:, :, k].sum() + truth[:, :, k].sum())
    assert dice > 0.7
    assert result["prompts"]["roi"] == [*sorted(roi[:2]), *roi[2:]]
    assert mask.any(axis=(0, 1)).sum() > 1


def test_scribbles_as_the_panel_sends_them(client, live_server, tmp_path):
    """All segments in one label map, numbered in their order, the layers of strokes last."""
    _, studies = live_server
    image = nib.load(studies / "phantom_000.nii.gz")
    truth = np.asarray(nib.load(studies / "truth" / "phantom_000.nii.gz").dataobj) == 1
    k = int(truth.sum(axis=(0, 1)).argmax())
    from scipy import ndimage

    middle = (
        ndimage.distance_transform_edt(truth[:, :, k])
        > 0.6 * ndimage.distance_transform_edt(truth[:, :, k]).max()
    )
    info = client.info()
    names = [*info["labels"], "background_scribbles", "foreground_scribbles"]
    painted = np.zeros(truth.shape, np.int16)
    painted[:, :, k][middle] = len(names)
    painted[0:3, 0:3, k] = len(names) - 1
    nib.save(nib.Nifti1Image(painted, image.affine), tmp_path / "scribbles.nii.gz")
    params = {
        **{
            key: v[0] if isinstance(v, list) else v
            for key, v in info["models"]["sam_scribble"]["config"].items()
        },
        "roi": [],
        "label_info": [{"name": name, "id": n} for n, name in enumerate(names, start=1)],
        "selected_label_name": "liver",
        "result_extension": ".nrrd",
        "result_dtype": "uint8",
    }
    path, result = client.infer("sam_scribble", "phantom_000", params, str(tmp_path / "scribbles.nii.gz"))
    mask = nrrd.read(path)[0] > 0
    assert result["label_names"] == {"liver": 1}
    assert mask[painted == len(names)].all()
    assert not mask[painted == len(names) - 1].any()
    assert mask.any(axis=(0, 1)).sum() > 1
    assert 2 * (mask & truth)[:, :, k].sum() > 0.6 * (mask[:, :, k].sum() + truth[:, :, k].sum())


def test_landmarks_of_several_labels(client, live_server):
    """Points of every label of /info/, as the panel sends them; value n is the n-th name for its import."""
    _, studies = live_server
    truth = np.asarray(nib.load(studies / "truth" / "phantom_000.nii.gz").dataobj)
    info = client.info()
    labels = info["models"]["sam_multi"]["labels"]
    assert set(info["labels"]) == set(labels)
    from scipy import ndimage

    points = {}
    for name in ("liver", "aorta"):
        inside = ndimage.distance_transform_edt(np.pad(truth == labels[name], 1))[1:-1, 1:-1, 1:-1]
        points[name] = [[int(v) for v in np.unravel_index(inside.argmax(), truth.shape)]]
    sent = {name: points.get(name, []) for name in info["labels"]}
    path, result = client.infer("sam_multi", "phantom_000", {**sent, "label": "aorta", **SLICER})
    mask = nrrd.read(path)[0]
    assert result["label_names"] == {"liver": 1, "aorta": 2}
    for name, value in result["label_names"].items():
        assert mask[tuple(points[name][0])] == value


def test_session_upload_infer_remove(client, live_server):
    _, studies = live_server
    session = client.create_session(str(studies / "phantom_001.nii.gz"))["session_id"]
    assert client.get_session(session)["image"]
    path, _ = client.infer("sam_click_2d", "", {"foreground": [[30, 30, 8]], **SLICER}, session_id=session)
    assert nrrd.read(path)[0].shape == (64, 64, 16)
    client.remove_session(session)


def test_upload_image_and_original_label(client, live_server):
    _, studies = live_server
    assert client.upload_image(str(studies / "photo_0.png"), "uploaded")["image"] == "uploaded"
    result = client.infer(
        "sam_click_2d", "uploaded", {"foreground": [[48, 36]], "label": "liver", "save_label": True, **SLICER}
    )
    assert result[1]["slice"] == 0
    everything = client.datastore()["objects"]
    assert everything["uploaded"]["labels"]["original"]["info"]["params"]["label_names"] in ({"liver": 1}, {})
    assert Path(client.download_label("uploaded", "original")).stat().st_size > 0


def test_bad_click_is_told_to_the_clinician(client):
    with pytest.raises(Exception) as caught:
        client.infer("sam_click_2d", "phantom_000", {"foreground": [[999, 0, 0]], **SLICER})
    assert "foreground = [999" in caught.value.msg


def test_training_with_too_few_labels_is_told(client):
    with pytest.raises(Exception) as caught:
        client.train_start("unet", {})
    assert "accepted cases" in caught.value.msg


def test_save_train_stop_and_train_to_the_end(client, live_server):
    """Accept all pictures, stop a training, run another to its end; the server serves on meanwhile."""
    _, studies = live_server
    for n in range(10):
        label = studies / "truth" / f"photo_{n}.png"
        info = {"label_info": [{"name": "liver", "idx": 1}, {"name": "aorta", "idx": 2}]}
        assert client.save_label(f"photo_{n}", str(label), params=info)["label"] == f"photo_{n}"
    assert client.info()["datastore"]["completed"] == 10

    task = client.train_start("unet", {"iterations": 100000})
    assert task["id"]
    with pytest.raises(Exception) as twice:
        client.train_start("unet", {})
    assert "Already Running" in twice.value.msg
    _wait(lambda: client.train_status(check_if_running=True))
    assert client.train_stop()["status"] == "STOPPED"
    _wait(lambda: not client.info()["train_stats"]["unet"])

    client.train_start("unet", {"iterations": 60})
    _wait(lambda: client.train_status(check_if_running=True))
    clicks = 0
    while client.train_status(check_if_running=True):
        client.infer("sam_click_2d", "photo_1", {"foreground": [[48, 36]], **SLICER})
        clicks += 1
        time.sleep(0.5)
    assert clicks
    status = client.train_status()
    assert status["status"] == "DONE", json.dumps(status)[-2000:]
    stats = client.info()["train_stats"]["unet"]
    assert 0 <= stats["best_metric"] <= 1
    assert stats["total_time"]
    assert isinstance(stats["published"], bool)


def test_proposal_of_the_trained_model(client, live_server):
    """After the training above, on discs that it cannot miss: an automatic mask that lies on the disc."""
    _, studies = live_server
    info = client.info()
    assert info["train_stats"]["unet"]["published"], info["train_stats"]
    assert "liver" in info["models"]["unet"]["labels"]
    path, result = client.infer("unet", "photo_0", SLICER)
    mask = nrrd.read(path)[0]
    assert mask.shape[:2] == (96, 72)
    assert "liver" in result["label_names"]
    assert sorted(result["label_names"].values()) == sorted(set(np.unique(mask).tolist()) - {0})
    found, truth = (
        mask.reshape(96, 72) == 1,
        np.asarray(PilImage.open(studies / "truth" / "photo_0.png")).T > 0,
    )
    assert 2 * (found & truth).sum() > 0.5 * (found.sum() + truth.sum())
