"""The bundled engine with the shipped weights, and its channels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sam_infer.engines.base import Engine
from sam_infer.engines.bundled import OUTSIDE, WEIGHTS, BundledEngine
from sam_infer.engines.bundledcrops import prompt_windows
from sam_infer.engines.bundledrank import FEATURES, agreement, quality, ranked
from sam_infer.geometry import tight_box
from sam_infer.networks.cropwindow import box_window, paste, to_crop, window_matrix
from sam_infer.networks.promptchannels import CHANNELS, SIZE, CropBatch, _blur, prompt_channels
from sam_infer.networks.promptnet import PromptNet
from sam_infer.types import Prompts
from trainers.pretrain.calibrate import rewrite

CENTRE, RADIUS = (110, 90), 35


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> BundledEngine:
    return BundledEngine()


def _disc(size: tuple[int, int] = (192, 224)) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[: size[0], : size[1]]
    truth = (x - CENTRE[0]) ** 2 + (y - CENTRE[1]) ** 2 <= RADIUS**2
    noise = np.random.default_rng(0).normal(0, 0.03, size)
    return np.clip(0.3 + 0.4 * truth + noise, 0, 1).astype(np.float32), truth


def _click(*points: tuple[float, float, int], **more: object) -> Prompts:
    xy = np.array([p[:2] for p in points], np.float32)
    return Prompts(points=xy, point_labels=np.array([p[2] for p in points], np.int64), **more)  # type: ignore[arg-type]


BOX = (75.0, 55.0, 145.0, 125.0)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_is_an_engine(engine: BundledEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.name == "bundled"


@pytest.mark.parametrize("prompt", [Prompts(box=BOX), _click((*CENTRE, 1))], ids=["box", "click"])
def test_segments_a_disc(engine: BundledEngine, prompt: Prompts) -> None:
    image, truth = _disc()
    answer = engine.decode(engine.encode(image), [prompt])[0]
    assert answer.logits.dtype == np.float32 and answer.logits.shape[1:] == truth.shape
    assert len(answer.iou) <= 3 and ((answer.iou >= 0) & (answer.iou <= 1)).all()
    assert answer.best == 0
    assert _iou(answer.mask(), truth) > 0.8


def test_colour_is_its_mean_and_the_place_is_right(engine: BundledEngine) -> None:
    image, _truth = _disc()
    grey = engine.decode(engine.encode(image), [Prompts(box=BOX)])[0]
    colour = engine.decode(engine.encode(np.stack([image] * 3, 2)), [Prompts(box=BOX)])[0]
    np.testing.assert_allclose(grey.logits, colour.logits, atol=1e-3)
    y, x = np.nonzero(grey.mask())
    assert abs(x.mean() - CENTRE[0]) < 1.5 and abs(y.mean() - CENTRE[1]) < 1.5


def test_several_prompts_equal_one_by_one(engine: BundledEngine) -> None:
    image, truth = _disc()
    embedding = engine.encode(image)
    logits = np.where(truth, 4, -4).astype(np.float32)
    prompts = [
        Prompts(box=BOX),
        _click((*CENTRE, 1), (10.0, 10.0, 0)),
        Prompts(mask_logits=logits),
        _click((100.0, 80.0, 1), (120.0, 100.0, 1), box=BOX, mask_logits=logits),
    ]
    together = engine.decode(embedding, prompts)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = engine.decode(embedding, [prompt])[0]
        np.testing.assert_allclose(alone.logits, answer.logits, atol=1e-2)
        np.testing.assert_allclose(alone.iou, answer.iou, atol=1e-3)
    assert engine.decode(embedding, []) == []


def test_clicks_are_obeyed_by_the_best_candidate(engine: BundledEngine) -> None:
    image, truth = _disc()
    embedding = engine.encode(image)
    answer = engine.decode(embedding, [_click((*CENTRE, 1), (180.0, 160.0, 0))])[0]
    assert answer.mask()[CENTRE[1], CENTRE[0]] and not answer.mask()[160, 180]
    whole = np.full(truth.shape, 4, np.float32)
    less = engine.decode(embedding, [_click((*CENTRE, 1), (20.0, 20.0, 0), mask_logits=whole)])[0]
    assert less.mask()[CENTRE[1], CENTRE[0]] and not less.mask()[20, 20]


def test_a_disobeying_candidate_ranks_below_an_obeying_one(engine: BundledEngine) -> None:
    logits = np.stack([np.full((8, 8), -1.0), np.full((8, 8), 1.0)]).astype(np.float32)
    answer = ranked(logits, np.array([0.99, 0.1], np.float32), _click((3.0, 3.0, 1)))
    assert answer.mask().all() and answer.iou[0] > answer.iou[1]


def test_agreement_is_the_mean_iou_with_the_others() -> None:
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2], masks[1, :2], masks[2, 0] = True, True, True
    assert agreement(masks).tolist() == [0.75, 0.75, 0.5]
    assert agreement(masks[:1]).tolist() == [0.0]


def test_signs_of_quality() -> None:
    valid = torch.ones(3, SIZE, SIZE)
    valid[2, :, SIZE // 2 :] = 0
    first = torch.full((3, SIZE, SIZE), -9.0)
    first[:, 32:96, 32:96] = 9.0
    logits = first.clone()
    logits[1, 32:96, 64:96] = -9.0
    logits[1, 32:96, 96:100] = 0.5
    logits[2, :, : SIZE // 2] = 9.0
    stability, steadiness, certainty, enclosure = quality(first, logits, valid)
    assert stability.tolist() == pytest.approx([1, 32 / 36, 1])
    assert steadiness.tolist()[:2] == pytest.approx([1, 32 / 68])
    sure = float(torch.sigmoid(torch.tensor(9.0)))
    assert certainty[0] == pytest.approx(sure) and 0.8 < certainty[1] < sure
    assert enclosure.tolist() == [1, 1, 0]


def test_a_box_is_answered_by_a_second_look(engine: BundledEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[CropBatch, torch.Tensor]] = []
    run = engine._run

    def watched(crops: CropBatch) -> tuple[torch.Tensor, torch.Tensor]:
        logits, iou = run(crops)
        seen.append((crops, logits))
        return logits, iou

    monkeypatch.setattr(engine, "_run", watched)
    image, _ = _disc()
    (answer,) = engine.answers(engine.encode(image), [Prompts(box=BOX)])
    (asked, first), (again, second) = seen
    assert asked.previous.abs().max() == 0 and torch.equal(again.previous, first.clamp(-12, 12))
    assert torch.equal(again.box, asked.box)
    expected = paste(second[0], prompt_windows(Prompts(box=BOX), image.shape)[0], image.shape, OUTSIDE)
    np.testing.assert_array_equal(answer.logits[0], expected.numpy())
    assert answer.features.shape == (1, len(FEATURES))
    seen.clear()
    logits = np.where(_disc()[1], 4, -4).astype(np.float32)
    engine.answers(engine.encode(image), [Prompts(box=BOX, mask_logits=logits)])
    assert len(seen) == 1  # a mask shows already what a second look would


def test_clicks_alone_are_looked_at_again_in_a_window_of_the_answer(
    engine: BundledEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, truth = _disc()
    embedding = engine.encode(image)
    looks: list[tuple[list[tuple[float, ...]], list[Prompts], np.ndarray]] = []
    look = engine._look

    def watched(embedding, windows, prompts):  # type: ignore[no-untyped-def]
        logits, features = look(embedding, windows, prompts)
        looks.append((windows, prompts, logits.copy()))
        return logits, features

    monkeypatch.setattr(engine, "_look", watched)
    (answer,) = engine.answers(embedding, [_click((*CENTRE, 1))])
    (_, _, far), (nearer, prompts, near) = looks
    np.testing.assert_array_equal(answer.logits, near)
    for n, prompt in enumerate(prompts):
        assert prompt.box == tight_box(far[n] > 0)
        assert nearer[n] == pytest.approx(box_window(prompt.box))
        steady = _iou(far[n] > 0, near[n] > 0)
        assert answer.features[n, FEATURES.index("steadiness")] == pytest.approx(steady)
    looks.clear()
    engine.answers(embedding, [_click((*CENTRE, 1), mask_logits=np.where(truth, 4, -4).astype(np.float32))])
    assert len(looks) == 1


def test_shrunken_object_is_found_from_the_neighbours_mask(engine: BundledEngine) -> None:
    image, truth = _disc()
    y, x = np.mgrid[: truth.shape[0], : truth.shape[1]]
    before = (x - CENTRE[0] - 4) ** 2 + (y - CENTRE[1]) ** 2 <= (1.3 * RADIUS) ** 2
    prompt = Prompts(mask_logits=np.where(before, 6, -6).astype(np.float32), box=(68.0, 44.0, 160.0, 136.0))
    answer = engine.decode(engine.encode(image), [prompt])[0]
    assert _iou(answer.mask(), truth) > _iou(before, truth) + 0.1


def test_fingerprint_follows_the_weights(tmp_path: Path, engine: BundledEngine) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(WEIGHTS, copy)
    assert BundledEngine(weights=copy).fingerprint == engine.fingerprint
    rewrite(copy, {"one": [0.25, 0.5, 0, 0, 0, 0, 0]})
    assert BundledEngine(weights=copy).fingerprint != engine.fingerprint


def test_calibration_is_applied(tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copy(WEIGHTS, copy)
    rewrite(copy, {"one": [0.625, 0, 0, 0, 0, 0, 0]})
    image, _ = _disc()
    constant = BundledEngine(weights=copy)
    assert constant.decode(constant.encode(image), [Prompts(box=BOX)])[0].iou[0] == pytest.approx(0.625)


def test_missing_weights_and_bad_prompts_are_told(tmp_path: Path, engine: BundledEngine) -> None:
    absent = BundledEngine(weights=tmp_path / "none.safetensors")
    image, _ = _disc()
    with pytest.raises(FileNotFoundError, match=r"trainers\.pretrain"):
        absent.decode(absent.encode(image), [Prompts(box=BOX)])
    with pytest.raises(ValueError, match="empty"):
        engine.decode(engine.encode(image), [Prompts()])
    with pytest.raises(ValueError, match="mask_logits"):
        engine.decode(engine.encode(image), [Prompts(mask_logits=np.ones((3, 3), np.float32))])
    with pytest.raises(ValueError, match="image"):
        engine.encode(np.zeros((4, 4, 2), np.float32))


def test_windows_round_trip() -> None:
    window = box_window((10.0, 20.0, 49.0, 39.0))
    matrix = window_matrix(window)
    there = to_crop(np.array([[10.0, 20.0]]), window)[0]
    np.testing.assert_allclose(matrix @ [*there, 1], [10, 20], atol=1e-9)
    ramp = torch.arange(SIZE, dtype=torch.float32)[None].repeat(SIZE, 1)
    back = paste(ramp, window, (60, 80), OUTSIDE)
    expected = to_crop(np.array([[30.0, 30.0]]), window)[0, 0]
    assert float(back[30, 30]) == pytest.approx(expected, abs=1e-3)
    assert float(back[0, 79]) == OUTSIDE


def test_channels_follow_their_prompts() -> None:
    image = torch.full((1, SIZE, SIZE), 0.2)
    image[:, 40:80, 50:90] = 0.8
    nothing = torch.zeros_like(image)
    box = torch.tensor([[50.0, 40.0, 89.0, 79.0]])
    points = torch.tensor([[[60.0, 70.0, 1.0], [5.0, 6.0, 0.0], [0.0, 0.0, -1.0]]])
    drawn = prompt_channels(
        CropBatch(image=image, valid=torch.ones_like(image), box=box, points=points, previous=nothing)
    )[0]
    channel = dict(zip(CHANNELS, drawn, strict=True))
    assert len(drawn) == len(CHANNELS) and torch.isfinite(drawn).all()
    assert channel["box"].sum() == pytest.approx(1600, rel=0.01)
    assert channel["ellipse"][59, 69] > 0.9 and channel["ellipse"][41, 51] < 0
    assert channel["positive"].argmax() == 70 * SIZE + 60
    assert channel["negative"].argmax() == 6 * SIZE + 5
    assert channel["posterior"][60, 70] > 0.8 and channel["posterior"][20, 20] < 0.2
    assert channel["previous"].abs().max() == 0


def test_blur_is_gaussian_with_repeated_edges() -> None:
    image = np.random.default_rng(0).random((2, SIZE, SIZE)).astype(np.float32)
    for sigma in (1.0, 2.5):
        expected = [gaussian_filter(plane, sigma, mode="nearest", truncate=2.5) for plane in image]
        np.testing.assert_allclose(_blur(torch.from_numpy(image), sigma).numpy(), expected, atol=1e-5)


def test_padding_among_the_points_changes_nothing() -> None:
    image = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    point = torch.tensor([60.0, 70.0, 1.0])
    crop = {"image": image, "valid": torch.ones_like(image), "box": torch.full((1, 4), torch.nan)}
    alone, padded = (
        prompt_channels(CropBatch(**crop, points=points, previous=torch.zeros_like(image)))
        for points in (point[None, None], torch.stack([torch.full((3,), -1.0), point])[None])
    )
    assert torch.equal(alone, padded)


def test_a_grown_network_answers_as_before() -> None:
    torch.manual_seed(0)
    small = PromptNet(widths=(8, 16), depths=(1, 1))
    with torch.no_grad():
        for value in small.parameters():
            value.add_(0.1 * torch.randn_like(value))
    grown = PromptNet(widths=(8, 16), depths=(2, 3))
    grown.grow_from(small.state_dict())
    inputs = torch.randn(2, len(CHANNELS), 32, 32)
    for before, after in zip(small(inputs), grown(inputs), strict=True):
        assert torch.equal(before, after)
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in small.parameters())
    for odd in (PromptNet(widths=(8, 24), depths=(1, 1)), PromptNet(widths=(8, 16, 24), depths=(1, 1, 1))):
        with pytest.raises(ValueError, match="number of blocks"):
            grown.grow_from(odd.state_dict())


def test_a_network_is_rebuilt_from_its_state() -> None:
    network = PromptNet(widths=(8, 16, 24), depths=(1, 3, 2))
    again = PromptNet.holding(network.state_dict())
    inputs = torch.randn(1, len(CHANNELS), 32, 32)
    assert torch.equal(network(inputs)[0], again(inputs)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu(engine: BundledEngine) -> None:
    image, _ = _disc()
    other = BundledEngine(device="cuda")
    here = engine.decode(engine.encode(image), [Prompts(box=BOX)])[0]
    there = other.decode(other.encode(image), [Prompts(box=BOX)])[0]
    assert _iou(here.mask(), there.mask()) > 0.98
