"""Labels arrive in 3D Slicer, and from it, under the right names, also where a class is absent."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from sam_infer.networks.classifier import ClassifierModel, build_classifier, save_classifier
from sam_infer.networks.unet import UnetModel, build_unet, save_unet, to_square
from tests import cam_data
from tests.conftest import save_png, serving
from tests.slicer_parts import Panel, reviewer_module, values_of

LABELS = {"liver": 1, "spleen": 2, "kidney": 3, "aorta": 4}
#: What the scenes hold: the disc is called spleen, the square aorta; liver and kidney never occur.
DISC, SQUARE = cam_data.LABELS.values()
PRESENT = {"spleen": DISC, "aorta": SQUARE}


def _learn(make, images, targets, loss, *, rate, steps):
    """A network that has seen 16 of the images in each step."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = make()
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    for _ in range(steps):
        drawn = torch.randint(len(images), (16,), generator=generator)
        optimiser.zero_grad()
        loss(network(images[drawn]), targets[drawn]).backward()
        optimiser.step()
    return network.eval().requires_grad_(False)


def _plant(folder):
    """A U-Net and a classifier that have seen 64 scenes, as trainings publish them."""
    scenes = cam_data.four_kinds(range(1000, 1064))
    grey = torch.from_numpy(np.stack([one for one, _ in scenes]))[:, None].float() / 255
    classes = np.zeros((len(scenes), 64, 64), np.uint8)
    for n, (_, labelmap) in enumerate(scenes):
        for name, value in PRESENT.items():
            classes[n][labelmap == value] = LABELS[name]
    channels = (16, 32)
    network = _learn(
        lambda: build_unet(labels=len(LABELS), channels=channels),
        grey,
        torch.from_numpy(classes).long(),
        torch.nn.functional.cross_entropy,
        rate=0.02,
        steps=150,
    )
    unet = UnetModel(network=network, labels=LABELS, size=64, channels=channels, training={"round": 1})
    save_unet(folder / "unet.safetensors", unet)
    channels = (8, 8, 16, 16)
    network = _learn(
        lambda: build_classifier(labels=len(LABELS), channels=channels),
        to_square(grey, cam_data.SIZE),
        torch.tensor([[float((one == value).any()) for value in LABELS.values()] for one in classes]),
        torch.nn.functional.binary_cross_entropy_with_logits,
        rate=0.005,
        steps=60,
    )
    cam = ClassifierModel(network=network, labels=LABELS, size=cam_data.SIZE, channels=channels)
    save_classifier(folder / "cam.safetensors", cam)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose models know of two of four labels; gives (url, studies)."""
    studies = tmp_path_factory.mktemp("names")
    (studies / ".samloop" / "models").mkdir(parents=True)
    _plant(studies / ".samloop" / "models")
    for n in range(6):
        save_png(studies / f"scene_{n}.png", cam_data.scene(n)[0])
    volume = np.full((24, 20, 6), -1000, np.int16)
    volume[4:10, 5:9, 1:5], volume[14:20, 8:14, 1:5] = 200, 60
    nib.save(nib.Nifti1Image(volume, np.diag([-1.5, 1, 2, 1])), studies / "ct.nii.gz")
    with serving(studies, tmp_path_factory.mktemp("apart"), "--labels", ",".join(LABELS)) as url:
        yield url, studies


@pytest.fixture
def panel(server, tmp_path):
    return Panel(server[0], tmp_path)


def _masks(n):
    """What scene n holds, name -> (64, 64, 1)."""
    labelmap = cam_data.scene(n)[1].T[..., None]
    return {name: labelmap == value for name, value in PRESENT.items()}


def _each_on_its_own(segments, n):
    """Whether each object of scene n is under its name, rather than under the other's, and no other is."""
    masks = _masks(n)
    for name, mask in masks.items():
        (other,) = (masks[one] for one in masks if one != name)
        if (segments[name] & mask).sum() <= 2 * (segments[name] & other).sum():
            return False
    return not segments["liver"].any() and not segments["kidney"].any()


@pytest.mark.parametrize("model", ["unet", "sam_auto_net", "sam_auto_cam"])
def test_what_a_model_finds_has_its_name(panel, model):
    """Two of four labels are there: values 1 and 2 are not liver and spleen."""
    panel.open({"id": "scene_0", "name": "scene_0.png"})
    reply = panel.segment(model)
    assert list(reply["label_names"]) == ["spleen", "aorta"]
    assert _each_on_its_own(panel.segments, 0)


@pytest.mark.parametrize("model", ["unet", "sam_auto_net", "sam_auto_cam"])
def test_what_was_stored_as_a_proposal_has_its_name_in_the_next_session(panel, model):
    panel.open({"id": "scene_1", "name": "scene_1.png"})
    panel.infer(model, {"save_label": True, **panel.options("models", model)})
    panel.open({"id": "scene_1", "name": "scene_1.png"})
    assert _each_on_its_own(panel.segments, 1)


def test_landmarks_of_the_last_label_alone(panel):
    panel.open({"id": "ct", "name": "ct.nii.gz"})
    reply = panel.click("sam_multi", "aorta", foreground=[[6, 6, 2]])
    assert reply["label_names"] == {"aorta": 1}
    assert panel.segments["aorta"][6, 6, 2]
    assert not any(panel.segments[name].any() for name in ("liver", "spleen", "kidney"))
    panel.infer("sam_multi", {"aorta": [[6, 6, 2]], "spleen": [[16, 10, 2]], "save_label": True})
    panel.open({"id": "ct", "name": "ct.nii.gz"})
    assert panel.segments["aorta"][6, 6, 2] and panel.segments["spleen"][16, 10, 2]
    assert not panel.segments["liver"].any() and not panel.segments["kidney"].any()


def _painted(panel, order, masks):
    """The panel's segments in an order, of which some are drawn."""
    panel.open({"id": "ct", "name": "ct.nii.gz"})
    panel.segments = {name: panel.empty() for name in order}
    for name, box in masks.items():
        panel.segments[name][box] = True


DRAWN = {"liver": np.s_[2:5, 2:5, 2], "kidney": np.s_[10:14, 3:6, 1:3], "aorta": np.s_[18:22, 9:12, :]}
ORDERS = {
    "as in the project": [*LABELS],
    "background first": ["background", *LABELS],
    "strokes in between": [
        "liver",
        "background_scribbles",
        "foreground_scribbles",
        "spleen",
        "kidney",
        "aorta",
    ],
    "turned round": ["aorta", "kidney", "spleen", "liver"],
    "turned round, background first": ["background", "aorta", "kidney", "spleen", "liver"],
    "only what was drawn": ["kidney", "aorta", "liver"],
    "another's segment, empty": ["Segment_1", "aorta", "liver", "kidney"],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("absent", [None, "liver", "kidney", "aorta"])
def test_what_is_submitted_is_stored_by_name(panel, order, absent):
    drawn = {name: box for name, box in DRAWN.items() if name != absent}
    _painted(panel, order, drawn)
    if (order, absent) == (ORDERS["strokes in between"], "kidney"):
        # Values 1 and 4 may be liver and aorta by their places, or liver and spleen by their idx.
        with pytest.raises(panel.module.MONAILabelClientException) as caught:
            panel.submit()
        assert "move the segments background and scribbles to the end of the list" in caught.value.msg
        return
    assert panel.submit() == {"image": "ct", "label": "ct"}
    stored = values_of(panel.client().download_label("ct", "final"))
    for name, index in LABELS.items():
        mask = panel.segments.get(name, panel.empty())
        assert ((stored == index) == mask).all(), name


def test_a_segment_of_another_name_is_refused_with_the_names(panel):
    _painted(panel, ["Segment_1", "liver"], {"Segment_1": np.s_[2:5, 2:5, 2]})
    with pytest.raises(panel.module.MONAILabelClientException) as caught:
        panel.submit()
    assert "label_info = 'Segment_1': not a label of this project" in caught.value.msg
    assert "1 = liver, 2 = spleen" in caught.value.msg


def test_nothing_drawn_is_an_accepted_case_without_objects(panel):
    _painted(panel, [*LABELS], {})
    panel.submit()
    assert not values_of(panel.client().download_label("ct", "final")).any()


# The reviewer's module


@pytest.fixture
def reviewer(server, monkeypatch):
    """The reviewer's own classes behind its buttons, connected."""
    controller = reviewer_module("ImageDataController", monkeypatch).ImageDataController()
    assert controller.connectToMonaiServer(server[0])
    assert controller.initMetaDataProcessing()
    return controller


def _case(reviewer, image_id):
    assert reviewer.initMetaDataProcessing()
    return reviewer.getMultImageDataByIds([image_id])[image_id]


def _rate(reviewer, case, tag, **meta):
    """As the reviewer's *Approve*, *Flag*, levels and comment are sent when the next case is opened."""
    meta = {"status": "", "level": "", "approvedBy": "Dr. R", "comment": "", **meta}
    assert not case.isEqualSegmentationMeta(tag=tag, **meta)
    case.updateSegmentationMetaByVerionTag(tag=tag, **meta)
    reviewer.updateLabelInfoOfAllVersionTags(
        imageData=case, versionTag=tag, level=meta["level"], updatedMetaJson=case.getMetaByVersionTag(tag=tag)
    )


def _edited(reviewer, case, tag, path):
    """As the reviewer saves what it has loaded: the values of the file that the server sent."""
    params = case.obtainUpdatedParams(tag)
    return reviewer.monaiServerREST.saveLabel(case.getName(), str(path), tag, params)


def test_reviewer_lists_loads_and_rates(panel, reviewer, tmp_path):
    _painted(panel, [*LABELS], DRAWN)
    panel.submit()
    case = _case(reviewer, "ct")
    assert case.isSegemented() and case.getClientId() == panel.user
    assert case.getFileName() == "ct.nii.gz"
    assert case.getSegmentationFileName() == "ct.nii.gz"
    assert "scene_5" in {one.getName() for one in reviewer.getAllImageData(False, True, False, False)}
    assert reviewer.getDicomDownloadUri("ct").endswith("/datastore/image?image=ct")
    assert reviewer.getStatistics()

    answer = reviewer.reuqestSegmentation("ct", "")
    (tmp_path / case.getSegmentationFileName()).write_bytes(answer.content)
    assert (values_of(tmp_path / "ct.nii.gz") == 4).sum() == panel.segments["aorta"].sum()

    _rate(reviewer, case, "final", status="flagged", level="hard", comment="cut off above")
    assert _case(reviewer, "ct").isFlagged()
    _rate(reviewer, _case(reviewer, "ct"), "final", status="approved", level="easy", comment="mended")
    found = _case(reviewer, "ct")
    assert found.isApproved() and not found.isFlagged()
    assert found.getLevel() == "easy" and found.getApprovedBy() == "Dr. R"
    assert [one.getName() for one in reviewer.getAllImageData(True, False, True, False)] == ["ct"]
    final = panel.client().datastore()["objects"]["ct"]["labels"]["final"]["info"]
    assert final["label_info"], "rating a label forgets nothing else of it"


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_reviewers_version_keeps_the_names(panel, reviewer, order, tmp_path):
    """What was submitted in whatever order is loaded, saved as a new version, overwritten and deleted."""
    drawn = {name: box for name, box in DRAWN.items() if name != "liver"}
    _painted(panel, order, drawn)
    panel.submit()
    stored = values_of(panel.client().download_label("ct", "final"))
    case = _case(reviewer, "ct")
    before = case.getVersionNames()[-1]
    (tmp_path / "loaded.nii.gz").write_bytes(reviewer.reuqestSegmentation("ct", "final").content)
    path = tmp_path / "edited.nrrd"
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "loaded.nii.gz")), str(path))

    tag = case.getNewVersionName()
    case.updateSegmentationMetaByVerionTag(tag=tag, status="approved", level="easy", approvedBy="Dr. R")
    assert _edited(reviewer, case, tag, path) == 200
    assert (values_of(panel.client().download_label("ct", tag)) == stored).all()
    assert _case(reviewer, "ct").isApprovedVersion(tag)
    assert _edited(reviewer, _case(reviewer, "ct"), tag, path) == 200
    assert reviewer.deleteLabelByVersionTag("ct", tag)
    assert _case(reviewer, "ct").getVersionNames()[-1] == before
    assert (values_of(panel.client().download_label("ct", "final")) == stored).all()


def test_reviewer_is_told_what_is_not_there(reviewer):
    assert reviewer.reuqestSegmentation("scene_5", "final") is None
    assert not reviewer.deleteLabelByVersionTag("scene_5", "version_1")
    assert not reviewer.updateLabelInfo("scene_5", "final", {"segmentationMeta": {}})
