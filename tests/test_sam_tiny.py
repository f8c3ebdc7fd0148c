"""``sam_tiny``: segment-anything's own classes, its predictor's answers, training, the shipped file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from segment_anything import SamPredictor, modeling
from segment_anything.modeling.image_encoder import Block

from sam_infer.engines.catalog import CATALOG, PACKAGED
from sam_infer.engines.registry import create_engine
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.geometry import tight_box
from sam_infer.networks.samtiny import SIDE, build_sam_tiny
from sam_infer.overlap import dice
from sam_infer.types import Prompts
from tests.conftest import disc
from trainers.pretrain.export import SAM_TINY, export
from trainers.pretrain.loop import Plan
from trainers.pretrain.pool import Pool, build_pool
from trainers.pretrain.recipe import Recipe, TinyRecipe
from trainers.pretrain.samtinycalibrate import bend
from trainers.pretrain.samtinyscenes import LOW, SceneSampler
from trainers.pretrain.samtinytraining import first_asked, train_sam_tiny
from trainers.samrounds import ambiguous, corrected, decode, losses

TINY = TinyRecipe(images=2, prompts=2, corrected=1, warmup=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    model = build_sam_tiny().eval()
    with torch.no_grad():  # masks of new weights are all but constant
        for layer in model.mask_decoder.output_hypernetworks_mlps:
            layer.layers[-1].weight *= 10
    return model


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return build_pool(tmp_path_factory.mktemp("pool"), None, Recipe(synthetic=12), 0)


def test_all_but_the_encoder_is_segment_anythings_own(sam):
    assert type(sam) is modeling.Sam
    assert type(sam.prompt_encoder) is modeling.PromptEncoder
    assert type(sam.mask_decoder) is modeling.MaskDecoder
    assert type(sam.mask_decoder.transformer) is modeling.TwoWayTransformer
    assert all(type(block) is Block for block in sam.image_encoder.blocks)


def test_adapters_find_the_layers_by_sams_names(sam):
    linear = {name for name, module in sam.named_modules() if isinstance(module, torch.nn.Linear)}
    for number, block in enumerate(sam.image_encoder.blocks):
        width = block.attn.qkv.in_features
        assert f"image_encoder.blocks.{number}.attn.qkv" in linear
        assert block.attn.qkv.out_features == 3 * width
    for layer in ("layers.0.self_attn", "layers.1.cross_attn_image_to_token", "final_attn_token_to_image"):
        for projection in ("q_proj", "v_proj"):
            assert f"mask_decoder.transformer.{layer}.{projection}" in linear


CASES = {
    "click": dict(points=[[60, 30]], point_labels=[1]),
    "clicks": dict(points=[[60, 30], [10, 50]], point_labels=[1, 0]),
    "box": dict(box=(12.0, 9.0, 70.0, 50.0)),
    "box and click": dict(box=(12.0, 9.0, 70.0, 50.0), points=[[60, 30]], point_labels=[0]),
}


@pytest.mark.parametrize("shape", [(70, 110), (300, 280)])
def test_answers_equal_those_of_segment_anythings_predictor(sam, shape):
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    engine, predictor = SamEngine(model=sam, name="sam_tiny"), SamPredictor(sam)
    embedding = engine.encode(image.astype(np.float32) / 255)
    predictor.set_image(image)
    for name, case in CASES.items():
        given = {k: np.array(v, np.float32 if k != "point_labels" else np.int64) for k, v in case.items()}
        answer = engine.decode(embedding, [Prompts(**(given | {"box": case.get("box")}))])[0]
        wanted, iou, low = predictor.predict(
            given.get("points"), given.get("point_labels"), given.get("box"),
            multimask_output=name == "click", return_logits=True,
        )  # fmt: skip
        np.testing.assert_allclose(answer.logits, wanted, atol=1e-4)
        np.testing.assert_allclose(answer.iou, np.clip(iou, 0, 1), atol=1e-4)
        assert low.shape[1:] == sam.prompt_encoder.mask_input_size == (LOW, LOW)


def test_a_previous_mask_is_given_as_the_predictor_takes_it(sam):
    """A square slice of half the input's side: the mask input is the previous logits, pixel by pixel."""
    image = np.random.default_rng(1).integers(0, 255, (LOW, LOW, 3), np.uint8)
    before = np.random.default_rng(2).normal(0, 3, (LOW, LOW)).astype(np.float32)
    engine, predictor = SamEngine(model=sam, name="sam_tiny"), SamPredictor(sam)
    answer = engine.decode(engine.encode(image.astype(np.float32) / 255), [Prompts(mask_logits=before)])[0]
    predictor.set_image(image)
    wanted, _, _ = predictor.predict(mask_input=before[None], multimask_output=False, return_logits=True)
    np.testing.assert_allclose(answer.logits, wanted, atol=1e-4)


def test_weights_come_back_from_their_file(sam, tmp_path):
    path = tmp_path / "mine.safetensors"
    export(sam.state_dict(), path, {"steps": 3}, SAM_TINY)
    engine = create_engine("sam_tiny", weights=path)
    assert isinstance(engine, SamEngine) and engine.name == "sam_tiny"
    for name, value in engine.model.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, sam.state_dict()[name], rtol=1e-3, atol=1e-4)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": SAM_TINY, "steps": "3"}


def test_wrong_and_damaged_files_are_told(tmp_path):
    content = (PACKAGED / CATALOG["sam_tiny"].file).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-1000])
    (tmp_path / "text.safetensors").write_text("no weights")
    image = np.zeros((8, 8), np.float32)
    for path, told in (
        (tmp_path / "cut.safetensors", "cut off"),
        (tmp_path / "text.safetensors", "neither"),
        (PACKAGED / "bundled.safetensors", "not a checkpoint of sam_tiny"),
        (tmp_path / "none.safetensors", "not there"),
    ):
        with pytest.raises(InputError, match=told) as error:
            create_engine("sam_tiny", weights=path).encode(image)
        assert error.value.argument == "weights"


def test_scenes_follow_seed_and_step_and_prompt_their_objects(pool):
    sampler = SceneSampler(pool, TINY, seed=0)
    same, other = sampler[3], SceneSampler(pool, TINY, seed=1)[3]
    for name, value in vars(sampler[3]).items():
        np.testing.assert_array_equal(value.numpy(), getattr(same, name).numpy())  # NaN equal NaN
    assert not torch.equal(same.image, other.image)
    seen = {"box": 0, "click": 0, "mask": 0}
    for step in range(12):
        scenes = sampler[step]
        box, click = torch.isfinite(scenes.box).all(-1), torch.isfinite(scenes.click).all(-1)
        mask = scenes.previous.flatten(2).any(-1)
        assert (box | click | mask).all() and not (box & click).any()
        assert (scenes.truth.flatten(2).sum(-1) > 5).all()
        for image, number in torch.nonzero(click).tolist():
            x, y = scenes.click[image, number].long().tolist()
            assert scenes.truth[image, number, y // 2, x // 2] > 0
        for name, flag in (("box", box), ("click", click), ("mask", mask)):
            seen[name] += int(flag.sum())
    assert min(seen.values()) >= 2


def test_prompts_of_several_images_are_decoded_as_one_by_one(sam, pool):
    scenes = SceneSampler(pool, TINY, seed=0)[0]
    with torch.inference_mode():
        features = sam.image_encoder(scenes.image.expand(-1, 3, -1, -1))
        asked = first_asked(scenes)
        masks, iou = decode(sam, features, asked)
        for number in range(len(masks)):
            one = asked.select(torch.tensor([number]))
            points = None
            if torch.isfinite(one.first).all():
                points = (one.first[:, None], torch.ones(1, 1))
            sparse, dense = sam.prompt_encoder(
                points=points,
                boxes=one.box if torch.isfinite(one.box).all() else None,
                masks=one.previous[:, None] if one.previous.any() else None,
            )
            owner = int(one.owner)
            wanted, quality = sam.mask_decoder.predict_masks(
                features[owner : owner + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            torch.testing.assert_close(masks[number], wanted[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(iou[number], quality[0], rtol=1e-3, atol=1e-3)


def test_the_best_of_three_masks_answers_one_click_and_the_first_mask_everything_else(pool):
    asked = first_asked(SceneSampler(pool, TINY, seed=0)[0])
    asked = replace(
        asked,
        box=torch.tensor([[5.0, 5, 90, 90], *[[torch.nan] * 4] * 3]),
        first=torch.tensor([[torch.nan] * 2, *[[40.0, 40]] * 3]),
        previous=torch.zeros_like(asked.previous),
    )
    assert ambiguous(asked).tolist() == [False, True, True, True]
    right = (asked.truth > 0.5).float() * 40 - 20
    masks = torch.stack([right, -right, right, -right], 1).requires_grad_()
    iou = torch.tensor([[1.0, 0, 1, 0]] * 4)
    wrong, chosen = losses(masks, iou, asked)
    assert wrong[0] < 0.2 and (wrong[1:] < 3).all(), "only a twentieth of the wrong masks counts"
    torch.testing.assert_close(chosen, right)
    spoilt, _ = losses(torch.stack([-right, right, right, right], 1), iou, asked)
    assert spoilt[0] > 10


def test_corrective_clicks_lie_in_the_errors(pool):
    asked = first_asked(SceneSampler(pool, TINY, seed=0)[0])
    logits = torch.where(torch.roll(asked.truth, 9, 2) > 0.5, 3.0, -3.0)
    for seed in range(6):
        again = corrected(asked, logits, np.random.default_rng(seed), side=SIDE)
        for number, (x, y, label) in enumerate(again.clicks[:, -1].tolist()):
            truth, mask = asked.truth[number] > 0.5, logits[number] > 0
            row, column = int(y) // 2, int(x) // 2
            assert bool(truth[row, column]) == bool(label) != bool(mask[row, column])
    exact = torch.where(asked.truth > 0.5, 3.0, -3.0)
    assert (corrected(asked, exact, np.random.default_rng(0), side=SIDE).clicks[:, -1, 2] == 1).all(), (
        "they confirm"
    )


def test_a_killed_training_goes_on_as_if_nothing_happened(pool, tmp_path):
    def plan(name: str, stop: int | None = None) -> Plan:
        return Plan(out=tmp_path / name, steps=2, workers=0, stop_at=stop)

    recipe = replace(TINY, images=1, prompts=1)
    whole, history = train_sam_tiny(SceneSampler(pool, recipe, seed=0), recipe, plan("whole"))
    _, first = train_sam_tiny(SceneSampler(pool, recipe, seed=0), recipe, plan("parts", stop=1))
    resumed, second = train_sam_tiny(SceneSampler(pool, recipe, seed=0), recipe, plan("parts"))
    assert len(first) == len(second) == 1 and len(set(history)) == 2
    assert first + second == pytest.approx(history, rel=1e-4)
    for name, value in whole.items():
        np.testing.assert_allclose(value.numpy(), resumed[name].numpy(), rtol=1e-3, atol=1e-5)


def test_calibration_puts_a_line_after_the_iou_head(sam):
    state = {name: value.clone() for name, value in sam.state_dict().items()}
    bend(state, slice(0, 1), [0.1, 0.5])
    bend(state, slice(1, 4), [-0.2, 2.0])
    other = build_sam_tiny().eval()
    other.load_state_dict(state)
    box = torch.tensor([[10.0, 20, 90, 80]])
    for several, offset, slope in ((False, 0.1, 0.5), (True, -0.2, 2.0)):
        found = []
        for model in (sam, other):
            sparse, dense = model.prompt_encoder(points=None, boxes=box, masks=None)
            place = model.prompt_encoder.get_dense_pe()
            found.append(model.mask_decoder(torch.ones(1, *dense.shape[1:]), place, sparse, dense, several))
        torch.testing.assert_close(found[0][0], found[1][0])
        torch.testing.assert_close(offset + slope * found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_the_shipped_weights_segment_a_disc():
    """Bright and dark discs in noise, by a box and by three clicks."""
    path = PACKAGED / CATALOG["sam_tiny"].file
    assert path.stat().st_size < 8_000_000
    engine = create_engine("sam_tiny")
    for sign in (-1, 1):
        truth = disc((200, 240), (110, 90), 42)
        noise = np.random.default_rng(0).normal(0, 0.04, truth.shape)
        image = np.clip(0.5 + sign * 0.2 * truth + noise, 0, 1).astype(np.float32)
        embedding = engine.encode(image)
        answer = engine.decode(embedding, [Prompts(box=tight_box(truth))])[0]
        assert dice(answer.mask(), truth) > 0.9
        assert answer.iou[0] > 0.6
        clicks = Prompts(
            points=np.array([[110, 90], [80, 90], [20, 20]], np.float32), point_labels=np.array([1, 1, 0])
        )
        assert dice(engine.decode(embedding, [clicks])[0].mask(), truth) > 0.7
    assert Path(CATALOG["sam_tiny"].page).name == "sam_tiny.md"
    assert CATALOG["sam_tiny"].side == SIDE
