"""Pretraining: sampler, permitted data, resuming, measuring."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sam_infer.engines.registry import create_engine
from sam_infer.networks.promptchannels import prompt_channels
from sam_infer.networks.promptnet import PromptNet
from sam_infer.overlap import dice
from sam_infer.types import Candidates, Prompts
from trainers.pretrain import data as data_module
from trainers.pretrain.__main__ import main
from trainers.pretrain.average import average
from trainers.pretrain.baselines import BASELINES, baseline, opencv
from trainers.pretrain.calibrate import error_unseen, fit, fit_cases
from trainers.pretrain.cases import BENCHMARK, MADE, Case, benchmark_cases, held_out_cases, made_cases
from trainers.pretrain.data import real_items
from trainers.pretrain.evaluate import answers_of, evaluate, markdown
from trainers.pretrain.evaluate import main as measure_main
from trainers.pretrain.export import export
from trainers.pretrain.loop import Plan
from trainers.pretrain.pool import Pool, build_pool
from trainers.pretrain.recipe import Recipe
from trainers.pretrain.sampler import Sampler
from trainers.pretrain.synthetic import _MAKERS, PARTS, SIDE, make_image
from trainers.pretrain.training import train

TINY = Recipe(synthetic=12, batch=3, corrected=1, warmup=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return build_pool(tmp_path_factory.mktemp("pool"), None, TINY, 0)


def _sampler(pool: Pool, seed: int = 0) -> Sampler:
    return Sampler(pool, TINY, seed=seed, size=2)


@pytest.mark.parametrize("maker", [m for m, _ in _MAKERS])
def test_every_maker_makes_objects(maker) -> None:  # type: ignore[no-untyped-def]
    image, labels = maker(np.random.default_rng(3))
    assert image.shape == labels.shape == (SIDE, SIDE) and labels.dtype == np.uint8
    assert np.isfinite(image).all() and (labels > 0).mean() > 0


def test_made_images_follow_their_seed() -> None:
    one, two, other = (make_image(np.random.default_rng(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one[0], two[0])
    assert one[2] == two[2]
    assert not np.array_equal(one[0], other[0])


def test_sampler_follows_seed_and_step(pool: Pool) -> None:
    one, two = _sampler(pool)[5], _sampler(pool)[5]
    for name, value in vars(one.crops).items():
        np.testing.assert_array_equal(value.numpy(), getattr(two.crops, name).numpy())  # NaN equal NaN
    assert not torch.equal(one.crops.image, _sampler(pool)[6].crops.image)
    assert not torch.equal(one.crops.image, _sampler(pool, seed=1)[5].crops.image)


def test_every_crop_has_an_object_and_a_prompt(pool: Pool) -> None:
    seen = {"box": 0, "click": 0, "mask": 0}
    for step in range(30):
        drawn = _sampler(pool)[step]
        assert (drawn.truth.sum((1, 2)) >= 20).all()
        has_box = torch.isfinite(drawn.crops.box).all(1)
        has_click = (drawn.crops.points[..., 2] == 1).any(1)
        has_mask = (drawn.crops.previous > 0).flatten(1).any(1)
        assert (has_box | has_click | has_mask).all()
        for name, flag in (("box", has_box), ("click", has_click), ("mask", has_mask)):
            seen[name] += int(flag.sum())
        rows, columns = torch.nonzero(drawn.crops.points[..., 2] == 1, as_tuple=True)
        x, y = drawn.crops.points[rows, columns, :2].long().unbind(1)
        assert (drawn.truth[rows, y, x] == 1).all()
    assert min(seen.values()) >= 5


def test_a_killed_training_goes_on_as_if_nothing_happened(pool: Pool, tmp_path: Path) -> None:
    def plan(name: str, stop: int | None = None) -> Plan:
        return Plan(out=tmp_path / name, steps=3, workers=0, stop_at=stop)

    whole, losses = train(_sampler(pool), TINY, plan("whole"))
    _, first = train(_sampler(pool), TINY, plan("parts", stop=2))
    resumed, second = train(_sampler(pool), TINY, plan("parts"))
    assert len(first) == 2 and len(second) == 1 and len(set(losses)) == 3
    assert first + second == pytest.approx(losses, rel=1e-5)
    for name, value in whole.items():
        np.testing.assert_allclose(value.numpy(), resumed[name].numpy(), rtol=1e-4, atol=1e-6)
    torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)


def test_an_old_checkpoint_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"x")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])


def test_training_goes_on_from_weights_of_a_shallower_network(pool: Pool, tmp_path: Path) -> None:
    before = PromptNet(depths=(1, 1, 1, 1))
    export(before.state_dict(), tmp_path / "start.safetensors", {})
    plan = Plan(out=tmp_path, steps=2, workers=0, stop_at=0, start=tmp_path / "start.safetensors")
    grown = PromptNet.holding(train(_sampler(pool), TINY, plan)[0])
    inputs = prompt_channels(_sampler(pool)[0].crops)
    with torch.inference_mode():
        np.testing.assert_allclose(grown(inputs)[0].numpy(), before(inputs)[0].numpy(), atol=0.05)  # fp16
        assert not torch.equal(PromptNet()(inputs)[0], grown(inputs)[0])


def test_bfloat16_trains_float32_weights_about_alike(pool: Pool, tmp_path: Path) -> None:
    _, exact = train(_sampler(pool), TINY, Plan(out=tmp_path / "a", steps=2, workers=0))
    weights, losses = train(_sampler(pool), TINY, Plan(out=tmp_path / "b", steps=2, workers=0, bfloat16=True))
    assert losses == pytest.approx(exact, rel=0.02) and losses != exact
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_the_pool_does_not_depend_on_the_number_of_workers(pool: Pool, tmp_path: Path) -> None:
    other = build_pool(tmp_path, None, TINY, 0, workers=2)
    assert other.entries == pool.entries
    assert (tmp_path / "pool.bin").read_bytes() == (pool.folder / "pool.bin").read_bytes()


def test_all_alike_parts_together_are_an_object_too(tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[10:30, 5:20], labels[10:30, 40:60] = 1, 2
    (tmp_path / "pool.bin").write_bytes(np.full_like(labels, 99).tobytes() + labels.tobytes())
    (tmp_path / "index.json").write_text(json.dumps({"entries": [[0, 64, 64, PARTS]]}))
    sampler, rng = Sampler(Pool(tmp_path), TINY, seed=0, size=1), np.random.default_rng(0)
    sizes = [int(found[1].sum()) for found in (sampler._object(rng) for _ in range(40)) if found]
    assert set(sizes) == {300, 400, 700}


@pytest.mark.slow
def test_command_line_trains_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sam_infer.engines.bundled import BundledEngine

    main(["--out", str(tmp_path), "--steps", "2", "--synthetic", "12", "--workers", "0"])
    assert "images made by code only" in capsys.readouterr().out
    engine = BundledEngine(weights=tmp_path / "bundled.safetensors")
    answer = engine.decode(engine.encode(np.zeros((40, 40), np.float32)), [Prompts(box=(5, 5, 20, 20))])
    assert answer[0].logits.shape == (1, 40, 40)


def _write_set(folder: Path, rows: list[dict[str, str]]) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_pair(folder: Path, stem: str, grey: int) -> None:
    image = np.full((64, 64), grey, np.uint8)
    labels = np.zeros((64, 64), np.uint8)
    labels[20:40, 20:40] = 1
    Image.fromarray(image).save(folder / "images" / f"{stem}.png")
    Image.fromarray(labels).save(folder / "labels" / f"{stem}.png")


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A data folder whose forbidden sets and rows raise when anything of them is opened."""
    rows = [{"stem": f"free{n}", "patientid": f"{n}", "license": "CC BY 4.0"} for n in range(20)]
    rows += [{"stem": f"bound{n}", "patientid": f"b{n}", "license": "CC BY-NC-SA"} for n in range(5)]
    _write_set(tmp_path / "cxr_lung_v7", rows)
    for row in rows:
        if row["stem"].startswith("free"):
            _write_pair(tmp_path / "cxr_lung_v7", row["stem"], 10 + int(row["patientid"]))
        else:  # not an image: opening it raises
            (tmp_path / "cxr_lung_v7" / "images" / f"{row['stem']}.png").write_bytes(b"forbidden")
    for name in (
        "us_breast_busi",
        "xray_dental_ufba425",
        "ct_abdomen_curvas",
        "ct_liver_ircad",
        "mr_left_atrium_la2018",
    ):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "manifest.csv").mkdir()  # reading it raises
        (tmp_path / name / "images" / "a.png").write_bytes(b"forbidden")
        (tmp_path / name / "images" / "a.nii.gz").write_bytes(b"forbidden")
    return tmp_path


def test_forbidden_sets_and_rows_are_never_opened(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda p, *a: (opened.append(Path(p)), real_open(p, *a))[1])
    monkeypatch.setattr(nib, "load", lambda p: pytest.fail(f"opened {p}"))
    rng = np.random.default_rng(0)
    train_items = list(real_items(sets, rng))
    held_items = list(real_items(sets, rng, held=True))
    assert {item.source for item in train_items + held_items} == {"cxr_lung_v7"}
    assert len(train_items) + len(held_items) == 20 and len(held_items) > 0
    assert {p.parent.parent.name for p in opened} == {"cxr_lung_v7"}
    assert all(p.name.startswith("free") for p in opened)
    greys = [{int(item.image[0, 0]) for item in items} for items in (train_items, held_items)]
    assert not greys[0] & greys[1]  # split by patient


def test_only_permitted_sets_are_named() -> None:
    text = Path(data_module.__file__).read_text()
    for name in ("us_breast", "xray_dental", "curvas", "ircad", "left_atrium"):
        assert name not in text


class _Echo:
    """An engine that answers a box with the box; clicks with all that is bright."""

    name, fingerprint = "echo", "0"

    def encode(self, image):  # type: ignore[no-untyped-def]
        return image

    def decode(self, image, prompts):  # type: ignore[no-untyped-def]
        mask = image > 0.5
        if prompts[0].box is not None and not len(prompts[0].points):
            mask = baseline("filled box", image, prompts[0].box)
        return [Candidates(logits=np.where(mask, 3, -3)[None].astype(np.float32), iou=np.ones(1, np.float32))]


def test_measuring_an_engine_with_known_answers() -> None:
    y, x = np.mgrid[:64, :64]
    truth = (x - 30) ** 2 + (y - 34) ** 2 <= 15**2
    case = Case(name="disc", group=BENCHMARK, image=truth.astype(np.float32), truth=truth)
    result = json.loads(json.dumps(evaluate(answers_of(_Echo()), [case])))  # type: ignore[arg-type]
    row = result["rows"]["disc"]
    assert row["c1"] == row["c5"] == row["box+1"] == row["Otsu in box"] == 1.0
    assert row["box"] == row["filled box"] == pytest.approx(0.849, abs=0.002)
    assert row["filled ellipse"] > 0.97 > row["filled ellipse, jitter"] > 0.6
    assert row["GrabCut"] > 0.99
    assert "disc" in markdown(result) and "GrabCut, jitter" in markdown(result)
    alone = evaluate(answers_of(_Echo()), [case], baselines=())  # type: ignore[arg-type]
    assert not any(name in markdown(alone) for name in BASELINES)


def test_the_click_path_is_measured_with_its_crops() -> None:
    engine = create_engine("sam_tiny")
    y, x = np.mgrid[:600, :500]
    truth = (x - 130) ** 2 + (y - 334) ** 2 <= 15**2
    image = (0.3 + 0.4 * truth).astype(np.float32)
    box = Prompts(box=(114.0, 318.0, 146.0, 350.0))
    whole, crop = (answers_of(engine, zoom=zoom)(image)(box) for zoom in (False, True))
    assert whole.crop is None and crop.crop is not None
    alone = answers_of(engine)(image)(box)
    np.testing.assert_allclose(whole.logits, alone.logits, atol=1e-2)
    assert dice(crop.mask(), truth) > 0.8


def test_grabcut_answers_a_box_around_everything() -> None:
    image = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    assert baseline("GrabCut", image, (0, 0, 49, 39)).shape == image.shape


def test_measuring_without_opencv_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match="OpenCV"):
        opencv()
    with pytest.raises(SystemExit):
        measure_main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err


def test_dice() -> None:
    a = np.array([[1, 1, 0]], bool)
    assert (
        dice(a, a) == 1 and dice(a, ~a) == 0 and dice(a, np.array([[1, 0, 0]], bool)) == pytest.approx(2 / 3)
    )


def test_calibration_finds_a_line_and_never_falls() -> None:
    features = np.random.default_rng(0).random((50, 2))
    assert fit(features, 0.5 * features[:, 0] + 0.3) == pytest.approx([0.3, 0.5, 0.0], abs=1e-3)
    assert fit(features, 1 - features[:, 0])[1] == pytest.approx(0.0, abs=1e-3)
    idle = np.column_stack([features[:, 0], np.ones(50)])
    assert fit(idle, 0.5 * features[:, 0] + 0.3) == pytest.approx([0.3, 0.5, 0.0], abs=1e-3)


def test_made_masks_weigh_as_much_as_real_ones_and_errors_are_of_unseen_objects() -> None:
    x = np.full((2, 1), 0.5)
    real, made = [(x, np.full(2, 0.4))], [(x, np.full(2, 0.8))] * 9
    line = fit_cases(real, made)
    assert line[0] + 0.5 * line[1] == pytest.approx(0.6, abs=1e-3)
    rng = np.random.default_rng(0)
    noise = [(rng.random((1, 4)), rng.random(1)) for _ in range(6)]
    rows = np.concatenate([f for f, _ in noise]), np.concatenate([r for _, r in noise])
    line = fit(*rows)
    seen = np.abs(np.clip(line[0] + rows[0] @ np.array(line[1:]), 0, 1) - rows[1]).mean()
    assert error_unseen(noise, [], folds=6) > seen


def test_made_cases_are_in_no_pool(pool: Pool) -> None:
    cases = list(made_cases(4, 0))
    assert cases and all(case.group == MADE and case.truth.sum() >= 50 for case in cases)
    held = {pool[n][0].tobytes() for n in range(len(pool))}
    assert not held & {np.round(case.image * 255).astype(np.uint8).tobytes() for case in cases}


MEASURED_ON = (
    "ct_abdomen_curvas", "ct_liver_ircad", "ct_totalseg_vessels", "ctmr_sts_mass", "cxr_lung_v7",
    "mr_left_atrium_la2018", "mr_wholeheart_hvsmr2", "multi_medscribble", "us_breast_busi",
    "xray_dental_ufba425",
)  # fmt: skip


@pytest.mark.real_data
def test_real_objects_are_where_the_tables_say(real_set: Callable[[str], Path]) -> None:
    (folder,) = {real_set(name).parent for name in MEASURED_ON}
    cases = list(benchmark_cases(folder, 2, 0)) + list(held_out_cases(folder, 1, 0))
    assert len({c.name for c in cases}) >= 12
    assert all(c.truth.any() and c.truth.shape == c.image.shape for c in cases)


def test_the_mean_of_two_files_is_a_file_of_the_same_kind(tmp_path: Path) -> None:
    for name, value, steps in (("a", 1.0, 10), ("b", 4.0, 30)):
        export(
            {"w": torch.full((2,), value)}, tmp_path / name, {"steps": steps, "recipe": {"rate": 1}}, "mine"
        )
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    with safe_open(tmp_path / "mean", "pt") as file:
        assert file.get_tensor("w").tolist() == [2.5, 2.5]
        assert file.metadata() == {
            "format": "mine", "steps": "30", "recipe": '{"rate": 1}', "averaged": "[10, 30]",
        }  # fmt: skip
    export({"w": torch.ones(3)}, tmp_path / "other", {}, "mine")
    with pytest.raises(ValueError, match="other holds another network than a"):
        average([tmp_path / "a", tmp_path / "other"], tmp_path / "no")
