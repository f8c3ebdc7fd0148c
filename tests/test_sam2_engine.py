"""The SAM 2 engine against sam2's own image predictor, with random weights."""

import threading

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from sam2.build_sam import build_sam2 as build_upstream
from sam2.sam2_image_predictor import SAM2ImagePredictor
from scipy import ndimage

from sam_infer.engines.base import Engine, VideoEngine
from sam_infer.engines.sam2 import Sam2Engine
from sam_infer.engines.sam2model import VARIANTS, build_sam2
from sam_infer.errors import InputError
from sam_infer.types import Prompts
from tests.sam2_nets import SIDE, random_sam2, save_random_sam2

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (70, 110)


def picture(seed, shape=SHAPE):
    """(H, W, 3) uint8: smooth random colours."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*shape, 3)), (6, 6, 0))
    return np.rint(255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)


@pytest.fixture(scope="module")
def network():
    return random_sam2()


@pytest.fixture(scope="module")
def predictor(network):
    predictor = SAM2ImagePredictor(network)
    predictor._bb_feat_sizes = [(SIDE // n,) * 2 for n in (4, 8, 16)]  # upstream's are those of 1024 pixels
    predictor.set_image(picture(0))
    return predictor


@pytest.fixture(scope="module")
def engine(network):
    return Sam2Engine(model=network)


@pytest.fixture(scope="module")
def embedding(engine):
    return engine.encode(picture(0).astype(np.float32) / 255)


POINTS = np.array([[60, 20], [10, 50], [100, 60]], np.float32)
CASES = {
    "one point": {"points": POINTS[:1], "point_labels": np.array([1])},
    "points": {"points": POINTS, "point_labels": np.array([1, 0, 1])},
    "box": {"box": (5.0, 6.0, 80.0, 60.0)},
    "box and point": {"points": POINTS[:1], "point_labels": np.array([0]), "box": (5.0, 6.0, 80.0, 60.0)},
}


def predict(predictor, prompts, mask_input=None):
    """Upstream's answer to the same prompts."""
    points = {"point_coords": prompts.points, "point_labels": prompts.point_labels}
    logits, iou, _ = predictor.predict(
        **(points if len(prompts.points) else {}),
        box=None if prompts.box is None else np.array(prompts.box),
        mask_input=mask_input,
        multimask_output=len(prompts.points) == 1 and prompts.box is None and mask_input is None,
        return_logits=True,
    )
    return logits, iou


def test_features_equal_the_predictors(engine, embedding, predictor, network):
    image = embedding.features["image_embed"] + network.no_mem_embed.reshape(1, -1, 1, 1)
    torch.testing.assert_close(image, predictor.get_image_embedding())
    for n, expected in enumerate(predictor._features["high_res_feats"]):
        torch.testing.assert_close(embedding.features[f"high_res_feats_{n}"], expected)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_predictors(engine, embedding, predictor, case):
    prompts = Prompts(**CASES[case])
    found = engine.decode(embedding, [prompts])[0]
    logits, iou = predict(predictor, prompts)
    assert found.logits.shape == logits.shape == (3 if case == "one point" else 1, *SHAPE)
    assert logits.std() > 0.5, "logits that differ tell something"
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_allclose(found.iou, iou, atol=1e-5)


@pytest.mark.parametrize("case", [None, *CASES])
def test_previous_logits_equal_the_predictors_mask_input(engine, embedding, predictor, case):
    before = engine.decode(embedding, [Prompts(box=(20.0, 6.0, 50.0, 60.0))])[0].logits[0]
    prompts = Prompts(**CASES[case] if case else {}, mask_logits=before)
    found = engine.decode(embedding, [prompts])[0]
    low = engine._mask_input(before[None])[0].numpy()
    assert low.shape == (1, SIDE // 4, SIDE // 4)
    logits, iou = predict(predictor, prompts, low)
    assert found.logits.shape == (1, *SHAPE)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_allclose(found.iou, iou, atol=1e-5)
    if case:
        without = engine.decode(embedding, [Prompts(**CASES[case])])[0]
        assert np.abs(without.logits[0] - found.logits[0]).max() > 0.1, "the mask prompt has an effect"


def test_a_batch_of_mixed_prompts_equals_one_by_one(engine, embedding):
    prompts = [Prompts(**case) for case in CASES.values()] + [Prompts(box=(50.0, 6.0, 90.0, 40.0))]
    for prompt, found in zip(prompts, engine.decode(embedding, prompts), strict=True):
        alone = engine.decode(embedding, [prompt])[0]
        np.testing.assert_allclose(found.logits, alone.logits, atol=1e-4)
        np.testing.assert_allclose(found.iou, alone.iou, atol=1e-5)


def test_grey_slices_are_grey_pictures_of_float_values(engine):
    """Twelve bits are not cut to eight: half a grey level of 255 changes the features."""
    grey = picture(1)[..., 0].astype(np.float32) / 255
    embedded = engine.encode(grey).features["image_embed"]
    torch.testing.assert_close(
        embedded, engine.encode(np.repeat(grey[..., None], 3, -1)).features["image_embed"]
    )
    finer = engine.encode(grey + np.float32(0.4 / 255)).features["image_embed"]
    assert not torch.allclose(embedded, finer)


def test_empty_prompt_is_an_error(engine, embedding):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.decode(embedding, [Prompts()])


def test_it_is_an_engine_with_a_fingerprint_of_weights_and_size(engine, network):
    assert isinstance(engine, Engine) and isinstance(engine, VideoEngine)
    assert Sam2Engine(model=random_sam2()).fingerprint == engine.fingerprint
    assert Sam2Engine(model=random_sam2(seed=1)).fingerprint != engine.fingerprint
    assert Sam2Engine(model=network, name="medsam2").fingerprint != engine.fingerprint
    assert Sam2Engine(model=network, device="cuda").fingerprint != engine.fingerprint, "bfloat16 features"


def test_nothing_global_is_changed(engine):
    before = (
        GlobalHydra.instance().hydra,
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    build_sam2("medsam2")
    grey = np.zeros(SHAPE, np.float32)
    steps = engine.track(
        range(1, 3),
        seeds={0: np.ones(SHAPE, bool)},
        embedding=lambda k: engine.encode(grey),
        clicks=lambda k: Prompts(),
        length=3,
    )
    next(steps)
    assert not torch.is_inference_mode_enabled(), "not between the steps either"
    assert GlobalHydra.instance().hydra is before[0]
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before[1:]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == tf32


def test_threads_get_their_own_answers(engine, embedding):
    other = engine.encode(picture(3).astype(np.float32) / 255)
    prompt = Prompts(**CASES["box"])
    expected = [engine.decode(e, [prompt])[0].logits for e in (embedding, other)]
    wrong = []

    def ask(n):
        for _ in range(3):
            found = engine.decode((embedding, other)[n], [prompt])[0].logits
            if not np.allclose(found, expected[n], atol=1e-4):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


LARGER = ["sam2.1_small", "sam2.1_base_plus", "sam2.1_large", "medsam2"]


@pytest.mark.parametrize("name", ["sam2.1_tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in LARGER)])
def test_parameters_are_those_of_sam2s_own_builder(name):
    upstream = build_upstream(f"configs/sam2.1/{VARIANTS[name].config}.yaml", device="cpu")
    model = build_sam2(name)
    model.load_state_dict(upstream.state_dict(), strict=True)
    assert model.image_size == VARIANTS[name].side


def test_missing_and_wrong_checkpoints_are_told(tmp_path):
    slice_ = np.zeros((8, 8), np.float32)
    with pytest.raises(ValueError, match="either weights"):
        Sam2Engine()
    with pytest.raises(InputError, match=r"SAM 2 variants are sam2\.1_tiny"):
        Sam2Engine(name="sam2.1_huge", weights=tmp_path / "x.pt").encode(slice_)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "wrong.pt")
    with pytest.raises(InputError, match=r"wrong\.pt.*not a checkpoint of SAM 2\.1 tiny: lacks"):
        Sam2Engine(weights=tmp_path / "wrong.pt").encode(slice_)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam2.1_tiny", "medsam2"])
def test_a_checkpoint_file_runs_at_its_real_size_and_equals_the_predictor(tmp_path, name):
    file = save_random_sam2(tmp_path / "sam2.pt", name)
    engine = Sam2Engine(name=name, weights=file)
    prompts = Prompts(**CASES["box"])
    found = engine.decode(engine.encode(picture(0).astype(np.float32) / 255), [prompts])[0]
    side = VARIANTS[name].side
    upstream = build_upstream(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        str(file),
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={side}"],
    )
    predictor = SAM2ImagePredictor(upstream)
    predictor._bb_feat_sizes = [(side // n,) * 2 for n in (4, 8, 16)]
    predictor.set_image(picture(0))
    np.testing.assert_allclose(found.logits, predict(predictor, prompts)[0], atol=1e-4)
