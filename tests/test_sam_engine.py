"""The SAM engine against segment-anything's own predictor, with random weights."""

import numpy as np
import pytest
import torch
from segment_anything import modeling as sa_modeling

from sam_infer.engines.framing import SAM
from sam_infer.engines.registry import create_engine
from sam_infer.engines.sam import SamEngine
from sam_infer.types import Prompts

SIDE = 256


def small_sam():
    """A SAM of segment-anything's own classes, with its image side cut to 256 px so that it runs fast."""
    from functools import partial

    torch.manual_seed(0)
    sam = sa_modeling.Sam(
        image_encoder=sa_modeling.ImageEncoderViT(
            depth=2,
            embed_dim=32,
            img_size=SIDE,
            mlp_ratio=2,
            num_heads=2,
            patch_size=16,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=[1],
            window_size=7,
            out_chans=256,
        ),
        prompt_encoder=sa_modeling.PromptEncoder(
            embed_dim=256,
            image_embedding_size=(SIDE // 16,) * 2,
            input_image_size=(SIDE,) * 2,
            mask_in_chans=16,
        ),
        mask_decoder=sa_modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=sa_modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=256, num_heads=8),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=64,
        ),
    )
    return sam.eval()


@pytest.fixture(scope="module")
def sam():
    return small_sam()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (70, 110, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor(sam, image):
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(image)
    return predictor


@pytest.fixture(scope="module")
def engine(sam):
    return SamEngine(model=sam)


@pytest.fixture(scope="module")
def embedding(engine, image):
    return engine.encode(image.astype(np.float32) / 255)


def test_embedding_equals_the_predictors(embedding, predictor):
    torch.testing.assert_close(embedding.features["image"], predictor.get_image_embedding())


POINTS = np.array([[60, 20], [10, 50]], np.float32)
CASES = {
    "one point": {"points": POINTS[:1], "point_labels": np.array([1])},
    "two points": {"points": POINTS, "point_labels": np.array([1, 0])},
    "box": {"box": (5.0, 6.0, 80.0, 60.0)},
    "box and point": {"points": POINTS[:1], "point_labels": np.array([0]), "box": (5.0, 6.0, 80.0, 60.0)},
}


def predicted(predictor, case, mask_input=None):
    """What ``SamPredictor`` answers, as (M, H, W) logits."""
    prompts = CASES[case]
    return predictor.predict(
        point_coords=prompts.get("points"),
        point_labels=prompts.get("point_labels"),
        box=np.array(prompts["box"]) if "box" in prompts else None,
        mask_input=mask_input,
        multimask_output=case == "one point" and mask_input is None,
        return_logits=True,
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_predictors(engine, embedding, predictor, case):
    prompts = Prompts(**CASES[case])
    found = engine.decode(embedding, [prompts])[0]
    logits, iou, _ = predicted(predictor, case)
    assert found.logits.shape == logits.shape == (3 if case == "one point" else 1, 70, 110)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_allclose(found.iou, iou.clip(0, 1), atol=1e-5)


def test_previous_logits_equal_the_predictors_mask_input(engine, embedding, predictor):
    first = Prompts(points=POINTS[:1], point_labels=np.array([1]))
    _, _, low = predictor.predict(POINTS[:1], np.array([1]), multimask_output=False)
    native = engine.decode(embedding, [Prompts(box=(5.0, 6.0, 80.0, 60.0))])[0].logits[0]
    with_mask = Prompts(points=first.points, point_labels=first.point_labels, mask_logits=native)
    changed = engine.decode(embedding, [with_mask])[0]
    without = engine.decode(embedding, [first])[0]
    assert changed.logits.shape == (1, 70, 110)
    assert not np.allclose(changed.logits[0], without.logits[0]), "the mask prompt has an effect"
    assert SAM.mask_input(torch.from_numpy(native[None]), SIDE, SIDE // 4).shape == (1, 1, *low.shape[1:])


def test_a_batch_of_mixed_prompts_equals_one_by_one(engine, embedding):
    prompts = [Prompts(**case) for case in CASES.values()]
    together = engine.decode(embedding, prompts)
    for prompt, found in zip(prompts, together, strict=True):
        alone = engine.decode(embedding, [prompt])[0]
        np.testing.assert_allclose(found.logits, alone.logits, atol=1e-4)


def test_empty_prompt_is_an_error(engine, embedding):
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.decode(embedding, [Prompts()])


def test_fingerprint_changes_with_the_weights(engine):
    other = small_sam()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert SamEngine(model=other).fingerprint != engine.fingerprint
    assert SamEngine(model=small_sam()).fingerprint == engine.fingerprint


@pytest.mark.parametrize("case", CASES)
def test_logits_with_a_mask_equal_the_predictors(engine, sam, case):
    """A slice of the size of SAM's mask input, so that the previous logits go in as they are."""
    from segment_anything import SamPredictor

    side = SIDE // 4
    image = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    mask = 3 * np.random.default_rng(2).normal(size=(side, side)).astype(np.float32)
    prompts = Prompts(**CASES[case], mask_logits=mask)
    found = engine.decode(engine.encode(image.astype(np.float32) / 255), [prompts])[0]
    np.testing.assert_allclose(found.logits, predicted(predictor, case, mask[None])[0], atol=1e-4)


@pytest.mark.slow
def test_vit_b_checkpoint_file_runs_and_equals_the_predictor(tmp_path, image):
    """The real ViT-B: 375 MB of random weights through a file."""
    from segment_anything import SamPredictor, sam_model_registry

    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]().eval()
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b.pth")
    engine = create_engine("sam_vit_b", weights=tmp_path / "sam_vit_b.pth")
    embedding = engine.encode(image.astype(np.float32) / 255)
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    for case, prompts in CASES.items():
        found = engine.decode(embedding, [Prompts(**prompts)])[0]
        np.testing.assert_allclose(found.logits, predicted(predictor, case)[0], atol=1e-4)
