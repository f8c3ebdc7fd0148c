"""From the study list to accepted labels to a retrained model: the real server, PACS and viewer."""

import io
import json
import os
import re
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
import SimpleITK as sitk
from scipy import ndimage

from tests.conftest import server_process
from tests.dicom_data import write_series
from tests.ohif_viewer import Viewer, browser
from trainers.phantoms import LABELS, make_phantom
from trainers.split import is_held_out

pytestmark = pytest.mark.browser

ROOT = "1.2.826.0.1.3680043.9.7433"
#: In the project's order; the viewer numbers them by name, after "background".
NAMES = ["spleen", "liver"]
ACCEPTED = 4


@pytest.fixture(scope="module")
def cases(orthanc, tmp_path_factory):
    """Phantoms in the PACS by series, in the order of their names: (patient, truth by name).

    The first four can be trained on, one of them is held out; every second one's slices are numbered from
    the head down.
    """
    studies = [f"{ROOT}.{n}" for n in range(10, 60)]
    held = [uid for uid in studies if is_held_out(f"{uid}.1", fraction=0.25)]
    free = [uid for uid in studies if uid not in held]
    chosen = sorted([held[0], *[uid for uid in free if uid > held[0]][:4]])
    found = {}

    def window(data, k):
        data.WindowCenter, data.WindowWidth = "40", "400"

    for n, study in enumerate(chosen):
        image, label, affine = make_phantom(n, (64, 64, 24))
        orthanc.stow(
            write_series(
                tmp_path_factory.mktemp("series"),
                image,
                affine=affine,
                reverse=n % 2 == 1,
                patient=f"PHANTOM_{n}",
                study_uid=study,
                series_uid=f"{study}.1",
                description="Abdomen",
                change=window,
            )
        )
        found[f"{study}.1"] = (f"PHANTOM_{n}", {name: label == LABELS[name] for name in NAMES})
    return found


@pytest.fixture(scope="module")
def server(orthanc, cases, tmp_path_factory):
    """The url of a server over these."""
    scratch = tmp_path_factory.mktemp("server")
    env = {"HOME": str(scratch)}
    with server_process(orthanc.url, scratch, "--labels", ",".join(NAMES), env=env) as (url, _):
        yield url


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = os.environ.get("SAMLOOP_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder)
    return tmp_path_factory.mktemp("shots")


@pytest.fixture
def viewer(server, shots):
    with browser() as chromium:
        page = chromium.new_context(viewport={"width": 1600, "height": 1000}).new_page()
        yield Viewer(page, server, shots)


def test_from_the_study_list_to_a_retrained_model(viewer, server, cases, orthanc, tmp_path):
    series = list(cases)
    viewer.study_list()
    viewer.page.get_by_text("PHANTOM_4").first.wait_for()
    viewer.shot("1-study-list")
    viewer.open_from_list("PHANTOM_0")
    viewer.press("Accept")
    assert "Connect to the server first" in viewer.said("Connect")
    viewer.connect()

    viewer.tab("Auto-Segmentation", "unet")
    refused, _ = viewer.run("Auto-Segmentation")
    assert refused.status == 409
    assert "not trained yet" in viewer.said("unet"), "the panel itself does not say why"

    for n, uid in enumerate(series[:ACCEPTED]):
        assert uid.rpartition(".")[0] in viewer.page.url
        accept_by_clicks(viewer, server, orthanc, uid, cases[uid], tmp_path, name=f"{2 + n}-case")
        (viewer.next_of_panel if n == 1 else viewer.next)()
        viewer.connect()
    assert len(orthanc.uids(Modality="SEG")) == ACCEPTED

    viewer.set_option("train", "unet", "iterations", "120")
    viewer.tab("Active Learning").get_by_role("button", name="Update Model").click()
    viewer.page.get_by_role("button", name="Stop Training").wait_for()
    viewer.shot("6-training")
    task = finished_training(server)
    assert task["status"] == "DONE", task
    assert task["request"]["iterations"] == 120, "as the panel's options say"
    assert requests.get(f"{server}/published/", timeout=60).json()["unet"], "a first model is served"

    # The panel is not connected anew: what it knows of the model is from before.
    uid = series[ACCEPTED]
    viewer.tab("Auto-Segmentation", "unet")
    _, drawn = viewer.run("Auto-Segmentation")
    viewer.show(middle(cases[uid][1]["liver"]))
    viewer.shot("7-retrained")
    labels = requests.get(f"{server}/info/", timeout=60).json()["models"]["unet"]["labels"]
    assert set(labels) == set(NAMES)
    expected, numbers = answer_of(server, "unet", uid), viewer.names()
    for name, value in labels.items():
        assert ((expected == value) == (drawn == numbers[name])).all(), name
    assert (drawn == numbers["liver"]).any()
    tab = viewer.tab("Class Prompts", "unet")
    tab.locator("tr", has_text="liver").get_by_role("checkbox").check()
    _, again = viewer.run("Class Prompts")
    assert (again == drawn).all(), "one label is drawn anew, the other stays"

    viewer.press("Accept")
    viewer.said("Accepted: ")
    info = requests.get(
        f"{server}/datastore/label/info", params={"label": uid, "tag": "final"}, timeout=60
    ).json()
    assert (info["model"], info["client_id"]) == ("unet", "ohif")
    viewer.press("Next sample")
    assert viewer.said("No case is left") == "No case is left: all are accepted."
    viewer.shot("8-all-accepted")
    assert viewer.errors == []
    assert {request.url.split("/")[2] for request in viewer.requests if request.url.startswith("http")} == {
        server.removeprefix("http://")
    }, "nothing is asked of any other host"


def accept_by_clicks(viewer, server, orthanc, uid, case, folder, *, name):
    """One click for each label, and accept; what the server and the PACS hold then is what was seen."""
    _, truth = case
    viewer.tab("Point Prompts", "sam_click_3d")
    before = np.zeros(truth["liver"].shape, bool)
    for label in ("liver", "spleen"):
        voxel = middle(truth[label])
        viewer.point(label, voxel)
        reply, drawn = viewer.run("Point Prompts")
        sent = json.loads(re.search(r'name="params"\r\n\r\n(.*?)\r\n--', reply.request.post_data, re.S)[1])
        assert (sent["foreground"], sent["background"]) == ([list(voxel)], []), (
            "a click is the voxel under it"
        )
        mask = drawn == viewer.names()[label]
        assert ((nrrd(reply.body()) > 0) & ~before == mask).all(), "it is drawn as the server answered"
        assert dice(mask, truth[label]) > 0.5, label
        before |= mask
    viewer.shot(name)
    viewer.press("Accept")
    assert re.fullmatch(
        r"Accepted: spleen [\d,]+ voxels \([\d.]+ ml\), liver [\d,]+ voxels .*", viewer.said("Accepted: ")
    )
    path = download(server, folder, "label", label=uid, tag="final")
    stored = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T
    numbers = viewer.names()
    for value, label in enumerate(NAMES, start=1):
        assert ((stored == value) == (drawn == numbers[label])).all(), label
    assert segmentation_of(orthanc, uid) == {label: int((drawn == numbers[label]).sum()) for label in NAMES}
    viewer.shot(f"{name}-accepted")


def test_what_is_not_sent_at_once(viewer, server, cases):
    patient, truth = next(iter(cases.values()))
    viewer.study_list()
    viewer.open_from_list(patient)
    viewer.connect()
    sent = []
    viewer.page.on("request", lambda request: sent.append(request) if request.method == "PUT" else None)
    viewer.bar().get_by_role("button", name="Accept").focus()
    viewer.page.keyboard.press("Space")
    viewer.said("Nothing is segmented")
    viewer.page.keyboard.press("Tab")
    viewer.page.keyboard.press("Enter")  # No
    viewer.bar().get_by_role("button", name="Yes").wait_for(state="hidden")
    assert not sent

    viewer.tab("Point Prompts", "sam_click_2d")
    voxel = middle(truth["liver"])
    viewer.page.mouse.click(
        *viewer.show(voxel)
    )  # without a label: the panel draws into a segment without a name
    viewer.clicked(1)
    _, drawn = viewer.run("Point Prompts")
    assert not np.isin(drawn[drawn > 0], list(viewer.names().values())).any()
    viewer.press("Accept")
    viewer.said("proposed while no label was chosen. Leave them out?")
    viewer.press("No")
    viewer.press("Next sample")
    viewer.said("What is segmented here is not accepted. Leave it?")
    viewer.press("No")
    assert not sent

    for status, text in (
        (401, "You are not logged in"),
        (507, "the disk is full"),
        (502, "The server answered 502"),
    ):
        viewer.page.route(
            "**/info/", answering(status, '{"detail": "the disk is full"}' if status == 507 else "<")
        )
        viewer.press("Accept")
        assert text in viewer.said(text)
        assert viewer.bar().get_by_role("link", name="Log in").count() == (status == 401)
    viewer.page.unroute("**/info/")
    assert not sent
    viewer.shot("9-refused")


def test_a_segmentation_that_was_opened_first_does_not_break_the_panel(viewer, server, cases, tmp_path):
    uid, (patient, truth) = next(iter(cases.items()))
    affine = nib.load(download(server, tmp_path, "image", image=uid)).affine
    nib.save(nib.Nifti1Image(truth["liver"].astype(np.uint8) * 2, affine), tmp_path / "label.nii.gz")
    with (tmp_path / "label.nii.gz").open("rb") as file:
        requests.put(
            f"{server}/datastore/label", params={"image": uid}, files={"label": file}, timeout=60
        ).raise_for_status()
    viewer.study_list()
    viewer.open_from_list(patient)
    viewer.page.get_by_text("SEG", exact=True).first.dblclick()
    viewer.page.get_by_role("button", name="Yes").evaluate("button => button.click()")
    viewer.page.wait_for_function("() => services.segmentationService.getSegmentations().length === 1")
    viewer.connect()
    viewer.tab("Point Prompts", "sam_click_3d")
    assert viewer.errors == []
    viewer.press("Accept")
    viewer.said("Another segmentation is open")
    viewer.shot("10-another-segmentation")


def answering(status, body):
    """A handler that answers in the server's place."""
    return lambda route: route.fulfill(status=status, body=body)


def middle(mask):
    """The voxel deepest inside a mask, on its largest slice."""
    k = int(mask.sum((0, 1)).argmax())
    inside = ndimage.distance_transform_edt(mask[:, :, k])
    i, j = np.unravel_index(inside.argmax(), inside.shape)
    return int(i), int(j), k


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def nrrd(content):
    """(I, J, K) of a raw NRRD file, in the order of its bytes, as the panel takes them."""
    header, _, voxels = content.partition(b"\n\n")
    sizes = [int(size) for size in re.search(rb"sizes: (.*)", header)[1].split()]
    return np.frombuffer(voxels, np.uint8).reshape(sizes, order="F")


def answer_of(server, model, uid):
    """(I, J, K): what a model answers, as the panel asks."""
    params = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    answer = requests.post(
        f"{server}/infer/{model}",
        params={"image": uid, "output": "image"},
        files={"params": (None, json.dumps(params))},
        timeout=300,
    )
    answer.raise_for_status()
    return nrrd(answer.content)


def download(server, folder, what, **params):
    """A file of the server's datastore, under its own name."""
    answer = requests.get(f"{server}/datastore/{what}", params=params, timeout=60)
    answer.raise_for_status()
    path = folder / re.search(r'filename="(.*)"', answer.headers["content-disposition"])[1]
    path.write_bytes(answer.content)
    return path


def segmentation_of(orthanc, uid):
    """Voxels by name of the one DICOM SEG of a series in the PACS."""
    found = {}
    for seg in orthanc.uids(Modality="SEG"):
        data = pydicom.dcmread(io.BytesIO(orthanc.file(seg)))
        if data.ReferencedSeriesSequence[0].SeriesInstanceUID != uid:
            continue
        assert not found, "one SEG a series"
        names = {segment.SegmentNumber: segment.SegmentLabel for segment in data.SegmentSequence}
        bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8), bitorder="little")
        frames = bits[: data.NumberOfFrames * data.Rows * data.Columns].reshape(data.NumberOfFrames, -1)
        found = dict.fromkeys(names.values(), 0)
        for frame, about in zip(frames, data.PerFrameFunctionalGroupsSequence, strict=True):
            number = about.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            found[names[number]] += int(frame.sum())
    return found


def finished_training(server, seconds=900):
    """The training's task, once it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        task = requests.get(f"{server}/train/", timeout=60).json()
        if task["status"] not in ("SUBMITTED", "RUNNING"):
            return task
        time.sleep(1)
    pytest.fail("the training does not end")
