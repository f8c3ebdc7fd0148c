import threading

import numpy as np
import pytest
import torch

from sam_infer.intensity import EIGHT_BIT
from sam_infer.networks.classifier import (
    ClassifierModel,
    build_classifier,
    check_size,
    last_maps,
    load_classifier,
    save_classifier,
)
from sam_infer.networks.unet import save_unet, to_square, windowed_slices
from tests.cam_data import LABELS, SIDE, as_image, four_kinds, presence_of, scene, trained
from tests.loop_data import one_thread  # noqa: F401
from tests.test_unet import model as unet_model

pytestmark = pytest.mark.usefixtures("one_thread")
CHANNELS = (4, 4, 4, 4)


def untrained(size=64, **kwargs):
    torch.manual_seed(0)
    network = build_classifier(labels=2, channels=CHANNELS)
    return ClassifierModel(network=network.eval(), labels=LABELS, size=size, channels=CHANNELS, **kwargs)


def volume(seeds):
    scenes = four_kinds(seeds)
    return as_image(*[image for image, _ in scenes]), [labelmap for _, labelmap in scenes]


def direct(model, image, k, label):
    """GradCAM by its formula at the input's resolution, ReLU and no normalisation, (8, 8)."""
    inputs = to_square(torch.from_numpy(windowed_slices(image, EIGHT_BIT, [k]))[:, None], model.size)
    kept = []
    handle = last_maps(model.network).register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.enable_grad():
        logit = model.network(inputs.requires_grad_())[0, list(LABELS).index(label)]
        (gradient,) = torch.autograd.grad(logit, kept[0])
    handle.remove()
    return torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * kept[0]).sum(dim=1))[0].detach().numpy()


def test_an_input_of_128_pixels_gives_8_by_8_maps_and_a_logit_for_each_label():
    network, kept = build_classifier(labels=3), []
    last_maps(network).register_forward_hook(lambda module, args, out: kept.append(out.shape))
    assert network(torch.zeros(2, 1, 128, 128)).shape == (2, 3) and kept[0][2:] == (8, 8)
    assert check_size(128) == 128
    with pytest.raises(ValueError, match="multiple of 16"):
        check_size(100)


def test_a_cell_of_the_last_maps_sees_a_small_part_of_the_slice():
    network, kept = build_classifier(labels=1, channels=CHANNELS).eval(), []
    last_maps(network).register_forward_hook(lambda module, args, out: kept.append(out))
    inputs = torch.rand(1, 1, 128, 128, requires_grad=True)
    network(inputs)
    (gradient,) = torch.autograd.grad(kept[0][0, :, 4, 4].sum(), inputs)
    rows = np.flatnonzero(gradient[0, 0].abs().sum(dim=1) > 0)
    assert rows[-1] - rows[0] + 1 <= 35


def test_presence_is_right_on_scenes_that_it_never_saw():
    image, labelmaps = volume(range(2000, 2040))
    found = trained().presence(image, EIGHT_BIT)
    wanted = np.array([presence_of(one) for one in labelmaps]) > 0
    assert found.shape == (40, 2) and found.dtype == np.float32
    assert ((found >= 0.5) == wanted).mean() > 0.9
    some = trained().presence(image, EIGHT_BIT, [7, 3])
    np.testing.assert_allclose(some, found[[7, 3]], atol=1e-5)
    assert trained().presence(image, EIGHT_BIT, []).shape == (0, 2)


def test_the_peak_of_the_map_lies_in_the_object():
    image, labelmaps = volume(range(2000, 2032))
    for name, value in LABELS.items():
        hits = []
        for k, labelmap in enumerate(labelmaps):
            if (labelmap == value).any():
                found = trained().activation(image, EIGHT_BIT, k, name)
                hits.append(bool(labelmap[np.unravel_index(found.argmax(), found.shape)] == value))
        assert len(hits) == 16 and np.mean(hits) > 0.75, (name, hits)


def test_the_map_is_gradcam_as_its_formula_says():
    image, labelmaps = volume(range(2000, 2004))
    model = trained()
    for k, labelmap in enumerate(labelmaps):
        for name in (name for name, value in LABELS.items() if (labelmap == value).any()):
            wanted = torch.from_numpy(direct(model, image, k, name))[None, None]
            grown = torch.nn.functional.interpolate(wanted, (128, 128), mode="bilinear", align_corners=False)
            small = torch.nn.functional.interpolate(grown, (64, 64), mode="bilinear", align_corners=False)
            oracle = small[0, 0].numpy()
            oracle = (oracle - oracle.min()) / (oracle.max() - oracle.min())
            found = model.activation(image, EIGHT_BIT, k, name)
            assert found.shape == (SIDE, SIDE) and (found.min(), found.max()) == (0.0, 1.0)
            np.testing.assert_allclose(found, oracle, atol=2e-3)


def test_the_map_of_a_slice_that_is_not_square_lies_on_the_slice():
    pixels, labelmap = scene(3, width=96, height=40, disc=False)
    found = trained().activation(as_image(pixels), EIGHT_BIT, 0, "square")
    rows, columns = np.nonzero(labelmap)
    weight = found * (found >= 0.4)
    y, x = (float((axis * weight).sum() / weight.sum()) for axis in np.mgrid[:40, :96])
    assert found.shape == (40, 96)
    assert abs(x - columns.mean()) < 12 and abs(y - rows.mean()) < 12


def test_a_map_that_is_the_same_everywhere_is_none():
    model = untrained()
    with torch.no_grad():
        model.network.fc.weight.fill_(-1.0)  # all evidence is against it: nothing is left of ReLU
    assert model.activation(as_image(scene(1)[0]), EIGHT_BIT, 0, "disc") is None


def test_an_unknown_label_is_named():
    with pytest.raises(ValueError, match=r"'liver'.*disc, square"):
        untrained().activation(as_image(scene(1)[0]), EIGHT_BIT, 0, "liver")


def test_threads_in_inference_mode_get_the_same_maps_at_once():
    image, _ = volume(range(2000, 2006))
    wanted = [trained().activation(image, EIGHT_BIT, k, "disc") for k in range(6)]
    presence = trained().presence(image, EIGHT_BIT)
    found, failures = {}, []

    def work(k):
        try:
            with torch.inference_mode():
                np.testing.assert_allclose(trained().presence(image, EIGHT_BIT), presence, atol=1e-5)
                found[k] = trained().activation(image, EIGHT_BIT, k, "disc")
        except Exception as error:  # told below, in the thread that can fail
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for k in range(6):
        np.testing.assert_allclose(found[k], wanted[k], atol=1e-4)
    assert not last_maps(trained().network)._forward_hooks


def test_file_round_trip_keeps_answers_and_header(tmp_path):
    before = untrained(threshold=0.3, window={"ct": [40, 400]}, training={"round": 2})
    digest = save_classifier(tmp_path / "cam.safetensors", before)
    after = load_classifier(tmp_path / "cam.safetensors")
    image, _ = volume(range(2))
    np.testing.assert_array_equal(after.presence(image, EIGHT_BIT), before.presence(image, EIGHT_BIT))
    assert list(after.labels.items()) == list(LABELS.items()) and after.fingerprint == digest[:16]
    assert (after.size, after.channels, after.threshold) == (64, CHANNELS, 0.3)
    assert (dict(after.window), after.training["round"]) == ({"ct": [40, 400]}, 2)


def test_a_file_of_another_kind_is_named(tmp_path):
    save_unet(tmp_path / "m.safetensors", unet_model())
    with pytest.raises(ValueError, match=r"m\.safetensors.*not a usable classifier file.*samloop-unet"):
        load_classifier(tmp_path / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="no classifier weights"):
        load_classifier(tmp_path / "absent.safetensors")
