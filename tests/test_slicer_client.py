"""3D Slicer's own client module against the real server: every call of its class, as its panel makes them."""

import json
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tests.slicer_parts import Panel, values_of

SLICER = {"result_extension": ".nrrd", "result_dtype": "uint8", "window_level": "", "window_width": ""}


@pytest.fixture(scope="module")
def panel(live_server, tmp_path_factory):
    return Panel(live_server[0], tmp_path_factory.mktemp("slicer"))


@pytest.fixture
def client(panel):
    return panel.client()


@pytest.fixture
def opened(panel, live_server):
    """The panel with a phantom open, and the phantom's true label map."""
    _, studies = live_server
    panel.sample, panel.segments, panel.points = {}, {}, {}
    panel.open({"id": "phantom_000", "path": str(studies / "phantom_000.nii.gz")})
    return panel, np.asarray(nib.load(studies / "truth" / "phantom_000.nii.gz").dataobj)


def _wait(happened, seconds=300):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def _inside(mask):
    """The voxel that is farthest from a mask's edge, and the mask's largest slice."""
    k = int(mask.sum(axis=(0, 1)).argmax())
    i, j = np.unravel_index(ndimage.distance_transform_edt(mask[:, :, k]).argmax(), mask.shape[:2])
    return [int(i), int(j), k], k


def _dice(found, truth):
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def _refused(call, *args, **kwargs):
    """The message that the panel shows for a request that is refused."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    assert type(caught.value).__name__ == "MONAILabelClientException", caught.value
    return caught.value.msg


def test_connect(panel, client):
    assert client.auth_enabled() is False
    assert client.get_server_url() == panel.url
    client.set_server_url(panel.url + "/ ")
    assert {"sam_click_2d", "sam_click_3d", "sam_multi", "sam_scribble", "unet"} <= set(
        client.info()["models"]
    )
    assert panel.info["labels"][0] == "liver"
    assert panel.dice == 0


def test_tokens_are_not_asked_for_where_nobody_logs_in(client):
    assert "404" in _refused(client.auth_token, "user", "password")
    assert client.auth_valid_token() is False


def test_slides_are_not_served_and_it_is_said(client):
    assert "Status: 404" in _refused(client.wsi_infer, "sam_click_2d", "photo_0")


def test_next_sample_of_every_strategy(panel):
    assert set(panel.info["strategies"]) == {"first", "random", "uncertainty", "disagreement", "diverse"}
    for strategy in panel.info["strategies"]:
        assert panel.next_sample(strategy) in panel.client().datastore()["objects"]
        assert Path(panel.sample["path"]).is_file()
        assert set(panel.segments) == {*panel.info["labels"]}


def test_a_case_is_downloaded_where_the_servers_files_are_not_seen(live_server, tmp_path):
    url, studies = live_server
    panel = Panel(url, tmp_path, shared=False)
    panel.open(
        {"id": "phantom_001", "name": "phantom_001.nii.gz", "path": str(studies / "phantom_001.nii.gz")}
    )
    assert (tmp_path / "phantom_001.nii.gz").read_bytes() == (studies / "phantom_001.nii.gz").read_bytes()


@pytest.mark.parametrize("section", ["models", "trainers", "strategies"])
def test_options_come_back_from_the_table_as_the_server_takes_them(opened, section):
    """Whoever opens the panel's options sends every number and text through a table."""
    panel, truth = opened
    click, _ = _inside(truth == 1)
    for name in panel.info[section]:
        options = panel.options(section, name)
        if section == "trainers":
            told = _refused(panel.client().train_start, name, options)
            assert "Status: 409" in told and "accept" in told
        elif section == "strategies":
            assert panel.client().next_sample(name, options)["id"]
        else:
            kind = panel.info["models"][name]["type"]
            sent = {"foreground": [click]} if kind == "deepgrow" else {"liver": [click]}
            if kind == "scribbles":
                continue  # its strokes are a file, below
            try:
                panel.infer(name, {**({} if kind == "segmentation" else sent), **options})
            except panel.module.MONAILabelClientException as error:
                assert "Status: 409" in error.msg or "Status: 404" in error.msg, error.msg
                assert not panel.info["models"][name]["labels"], "what is listed with labels can answer"


def test_points_on_a_slice(opened):
    """A click in the middle of the liver's largest slice."""
    panel, truth = opened
    click, k = _inside(truth == 1)
    reply = panel.click("sam_click_2d", "liver", foreground=[click], point=click)
    mask = panel.segments["liver"]
    assert reply["label_names"] == {"liver": 1}
    assert reply["slice"] == k
    assert mask[tuple(click)]
    assert mask.sum() == mask[:, :, k].sum()


def test_a_slice_that_is_done_stays_while_the_next_is_clicked(opened):
    panel, truth = opened
    click, k = _inside(truth == 1)
    panel.click("sam_click_2d", "liver", foreground=[click], point=click)
    first = panel.segments["liver"][:, :, k].copy()
    above = [*click[:2], k + 1]
    reply = panel.click("sam_click_2d", "liver", foreground=[above], point=above)
    assert reply["slice"] == k + 1
    assert (panel.segments["liver"][:, :, k] == first).all()
    assert panel.segments["liver"][:, :, k + 1].any()


def test_the_panel_sends_points_of_all_slices_with_slice_0(opened):
    panel, truth = opened
    click, k = _inside(truth == 1)
    panel.click("sam_click_2d", "liver", foreground=[click], point=click)
    reply = panel.click("sam_click_2d", "liver", foreground=[[5, 5, 0]], point=[5, 5, 0])
    assert reply["slice"] == 0
    assert reply["prompts"]["ignored_points"] == 1
    assert panel.segments["liver"][:, :, k].any()


def test_a_point_against_what_spilled_over(opened):
    panel, truth = opened
    click, k = _inside(truth == 1)
    panel.click("sam_click_2d", "liver", foreground=[click], point=click)
    before = panel.segments["liver"][:, :, k].sum()
    outside = np.argwhere(panel.segments["liver"][:, :, k])[0]
    against = [int(outside[0]), int(outside[1]), k]
    panel.click("sam_click_2d", "liver", background=[against], point=against)
    assert not panel.segments["liver"][tuple(against)]
    assert panel.segments["liver"][:, :, k].sum() < before


def test_roi_through_the_volume(opened):
    """A box around the liver on one slice, with a reversed axis as the panel's rounding gives it."""
    panel, truth = opened
    liver = truth == 1
    _, k = _inside(liver)
    i, j = np.nonzero(liver[:, :, k])
    roi = [int(i.max()), int(i.min()), int(j.min()), int(j.max()), k, k]
    reply = panel.click("sam_click_3d", "liver", roi=roi)
    assert reply["prompts"]["roi"] == [*sorted(roi[:2]), *roi[2:]]
    assert _dice(panel.segments["liver"][:, :, k], liver[:, :, k]) > 0.7
    assert panel.segments["liver"].any(axis=(0, 1)).sum() > 1


def test_another_label_resets_what_was_followed(opened):
    panel, truth = opened
    for n, name in ((1, "liver"), (5, "aorta")):
        click, _ = _inside(truth == n)
        panel.label_changed = n == 5
        panel.click("sam_click_3d", name, foreground=[click], point=click)
        assert panel.segments[name][tuple(click)]
    panel.label_changed = False


def test_scribbles_as_the_panel_sends_them(opened):
    """All segments in one label map, numbered in their order, the layers of strokes last; then corrected."""
    panel, truth = opened
    liver = truth == 1
    _, k = _inside(liver)
    depth = ndimage.distance_transform_edt(liver[:, :, k])
    panel.segments["background_scribbles"] = panel.empty()
    panel.segments["background_scribbles"][0:3, 0:3, k] = True
    panel.segments["foreground_scribbles"] = strokes = panel.empty()
    strokes[:, :, k] = depth > 0.6 * depth.max()
    reply = panel.scribble("sam_scribble", "liver")
    mask = panel.segments["liver"]
    assert reply["label_names"] == {"liver": 1}
    assert mask[strokes].all()
    assert not mask[0:3, 0:3, k].any()
    assert mask.any(axis=(0, 1)).sum() > 1
    assert _dice(mask[:, :, k], liver[:, :, k]) > 0.6

    panel.segments["background_scribbles"], panel.segments["foreground_scribbles"] = strokes, panel.empty()
    edge = [0, truth.shape[0] - 1, 0, truth.shape[1] - 1, k + 1, k - 1]
    panel.scribble("sam_scribble", "liver", roi=edge)
    assert not panel.segments["liver"][strokes].any()


def test_landmarks_of_several_labels(opened):
    """Points of every label of /info/, placed for one after the other; each arrives under its name."""
    panel, truth = opened
    labels = panel.info["models"]["sam_multi"]["labels"]
    assert set(panel.info["labels"]) == set(labels)
    clicks = {name: _inside(truth == labels[name])[0] for name in ("aorta", "liver")}
    for name, click in clicks.items():
        reply = panel.click("sam_multi", name, foreground=[click], point=click)
    assert reply["label_names"] == {"liver": 1, "aorta": 2}
    for name, click in clicks.items():
        assert panel.segments[name][tuple(click)]
    kept = panel.segments["liver"].copy()
    away = _inside(kept)[0]
    panel.click("sam_multi", "background", foreground=[away], point=away, freeze=False)
    assert not panel.segments["liver"][tuple(away)]


def test_freeze_changes_the_chosen_segment_only(opened):
    panel, truth = opened
    liver, aorta = _inside(truth == 1)[0], _inside(truth == 5)[0]
    panel.click("sam_multi", "liver", foreground=[liver], point=liver)
    panel.segments["liver"][:] = False
    panel.click("sam_multi", "aorta", foreground=[aorta], point=aorta, freeze=True)
    assert panel.segments["aorta"][tuple(aorta)]
    assert not panel.segments["liver"].any()


@pytest.mark.parametrize("name", ["session", "303: CT abdomen / portal"])
def test_a_volume_of_the_viewer_itself(panel, live_server, name):
    """Opened from a file: clicked on in a session, whatever 3D Slicer calls it."""
    _, studies = live_server
    panel.open_volume(studies / "phantom_001.nii.gz", name)
    panel.click("sam_click_2d", "liver", foreground=[[30, 30, 8]], point=[30, 30, 8])
    session = panel.sample["session_id"]
    panel.click("sam_click_3d", "liver", foreground=[[30, 30, 8]])
    assert panel.sample["session_id"] == session
    assert panel.segments["liver"].shape == (64, 64, 16)
    assert panel.client().remove_session(session)["image"]
    assert "404" in _refused(panel.client().get_session, session)
    assert name not in panel.client().datastore()["objects"]


def test_a_volume_of_the_viewer_is_uploaded_when_its_label_is_submitted(panel, live_server):
    _, studies = live_server
    panel.open_volume(studies / "phantom_001.nii.gz", "Läsion 1+2 (neu)")
    panel.click("sam_click_3d", "liver", foreground=[[30, 30, 8]])
    assert panel.submit() == {"image": "Läsion 1+2 (neu)", "label": "Läsion 1+2 (neu)"}
    stored = values_of(panel.client().download_label("Läsion 1+2 (neu)", "final"))
    assert ((stored == 1) == panel.segments["liver"]).all()
    assert panel.progress > 0


def test_a_name_that_cannot_be_stored_is_told(panel, live_server):
    _, studies = live_server
    panel.open_volume(studies / "phantom_001.nii.gz", "303: CT")
    assert "image = '303: CT': send an id" in _refused(panel.submit)
    panel.sample["id"] = "CT 303"  # renamed in the module Data
    panel.upload()
    assert panel.submit()["image"] == "CT 303"


def test_a_proposal_comes_with_the_next_sample(panel, live_server):
    _, studies = live_server
    client = panel.client()
    assert client.upload_image(str(studies / "photo_0.png"), "uploaded")["image"] == "uploaded"
    sent = {"foreground": [[48, 36]], "label": "liver", "save_label": True, **SLICER}
    assert client.infer("sam_click_2d", "uploaded", sent)[1]["slice"] == 0
    panel.open({"id": "uploaded", "name": "uploaded.png"})
    stored = values_of(client.download_label("uploaded", "original")) == 1
    assert stored.any()
    assert (panel.segments["liver"] == stored.reshape(panel.segments["liver"].shape)).all()


def test_messages_for_the_clinician(panel, client):
    bad = {"foreground": [[999, 0, 0]], **SLICER}
    assert "foreground = [999" in _refused(client.infer, "sam_click_2d", "phantom_000", bad)
    assert "image = 'gone': no such image" in _refused(client.infer, "sam_click_2d", "gone", {**SLICER})
    assert "send at least one" in _refused(client.infer, "sam_click_3d", "phantom_000", {**SLICER})
    assert "accepted cases" in _refused(client.train_start, "unet", {})
    assert "accepted cases" in _refused(client.train_start, None, {})
    assert "No Train Tasks Found" in _refused(client.train_status)
    assert client.train_status(check_if_running=True) is False
    assert client.train_stop() is None


def test_save_train_stop_and_train_to_the_end(panel, client, live_server):
    """Accept all pictures, stop a training, run another to its end; the server serves on meanwhile."""
    _, studies = live_server
    for n in range(10):
        label = studies / "truth" / f"photo_{n}.png"
        info = {"label_info": [{"name": "liver", "idx": 1}, {"name": "aorta", "idx": 2}]}
        assert client.save_label(f"photo_{n}", str(label), params=info)["label"] == f"photo_{n}"
    assert client.info()["datastore"]["completed"] == 12

    task = client.train_start("unet", {**panel.options("trainers", "unet"), "iterations": 100000})
    assert task["id"] and task["start_ts"]
    assert "Already Running" in _refused(client.train_start, "unet", {})
    _wait(lambda: client.train_status(check_if_running=True))
    stopped = client.train_stop()
    assert stopped["status"] == "STOPPED"
    assert stopped["start_ts"] and stopped["end_ts"]
    stopped.get("result", stopped.get("details", [])[-1])  # as the panel takes it
    _wait(lambda: not client.info()["train_stats"]["unet"])

    client.train_start("unet", {"iterations": 60})
    _wait(lambda: client.train_status(check_if_running=True))
    clicks = 0
    while client.train_status(check_if_running=True):
        client.infer("sam_click_2d", "photo_1", {"foreground": [[48, 36]], **SLICER})
        panel.refresh()
        assert 0 <= panel.epochs <= 100
        clicks += 1
        time.sleep(0.5)
    assert clicks
    status = client.train_status()
    assert status["status"] == "DONE", json.dumps(status)[-2000:]
    panel.refresh()
    assert 0 <= panel.dice <= 100
    stats = panel.info["train_stats"]["unet"]
    assert stats["total_time"]
    assert isinstance(stats["published"], bool)


def test_proposal_of_the_trained_model(panel, live_server):
    """After the training above, on discs that it cannot miss: an automatic mask that lies on the disc."""
    _, studies = live_server
    assert panel.info["train_stats"]["unet"]["published"], panel.info["train_stats"]
    panel.open({"id": "photo_0", "path": str(studies / "photo_0.png")})
    for model in ("unet", "sam_auto_net"):
        reply = panel.segment(model)
        assert "liver" in reply["label_names"]
        truth = values_of(studies / "truth" / "photo_0.png") > 0
        assert _dice(panel.segments["liver"][:, :, 0], truth.reshape(96, 72)) > 0.5


def test_nothing_left(panel, live_server):
    _, studies = live_server
    shutil.copy(studies / "truth" / "photo_0.png", panel.folder / "uploaded.png")
    for case in ("phantom_000", "phantom_001"):
        panel.client().save_label(case, str(studies / "truth" / f"{case}.nii.gz"), params={})
    panel.client().save_label("uploaded", str(panel.folder / "uploaded.png"), params={})
    assert panel.next_sample("first") is None
    panel.refresh()
    assert panel.progress == 100
