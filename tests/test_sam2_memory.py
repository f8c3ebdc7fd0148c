"""Following an object from memory against sam2's own video predictor, with random weights."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import sam2.sam2_video_predictor as upstream
import sam2.utils.misc
import torch
import torch.nn.functional as F
from sam2.build_sam import build_sam2_video_predictor
from scipy import ndimage
from skimage import measure

from sam_infer.engines.sam2 import Sam2Engine
from sam_infer.engines.sam2memory import SliceMemory, fill_holes
from sam_infer.types import Prompts
from tests.conftest import disc
from tests.sam2_nets import SIDE, random_sam2

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, LENGTH = (70, 110), 20
NO_CLICKS = Prompts()


@dataclass(frozen=True)
class Film:
    """A volume's slices, encoded once."""

    engine: Sam2Engine
    slices: np.ndarray
    embeddings: list

    def follow(self, path, seeds, clicks=lambda k: NO_CLICKS, engine=None, length=LENGTH):
        """{k: (H, W) logits} along a path."""
        found = (engine or self.engine).track(
            path, seeds=seeds, embedding=self.embeddings.__getitem__, clicks=clicks, length=length
        )
        return {k: candidates.logits[0] for k, candidates in found}


@pytest.fixture(scope="module")
def film():
    noise = np.random.default_rng(5).normal(size=(LENGTH, *SHAPE))
    smooth = ndimage.gaussian_filter(noise, (1.5, 5, 5)).astype(np.float32)
    slices = (smooth - smooth.min()) / np.ptp(smooth)
    engine = Sam2Engine(model=random_sam2())
    return Film(engine, slices, [engine.encode(s) for s in slices])


@pytest.fixture(scope="module")
def components():
    """A stand-in for sam2's compiled CUDA function, so that upstream too fills holes."""

    def count(mask):
        labels = measure.label(mask[0, 0].numpy(), connectivity=2)
        areas = np.bincount(labels.ravel())[labels]
        return torch.from_numpy(labels)[None, None], torch.from_numpy(areas)[None, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam2.utils.misc, "get_connected_components", count)
        yield count


@pytest.fixture(scope="module")
def predictor(film, components):
    size = f"[{SIDE // 16},{SIDE // 16}]"
    layer = "++model.memory_attention.layer"
    predictor = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        device="cpu",
        hydra_overrides_extra=[
            f"++model.image_size={SIDE}",
            f"{layer}.self_attention.feat_sizes={size}",
            f"{layer}.cross_attention.feat_sizes={size}",
        ],
    )
    predictor.load_state_dict(film.engine.model.state_dict())
    return predictor


@pytest.fixture
def state(film, predictor, monkeypatch):
    """Upstream's state over the same frames, which it would otherwise read from a folder of JPEG files."""
    frames = F.interpolate(
        torch.from_numpy(film.slices)[:, None], (SIDE, SIDE), mode="bilinear", antialias=True
    ).repeat(1, 3, 1, 1)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    loaded = ((frames - mean) / deviation, *SHAPE)
    monkeypatch.setattr(upstream, "load_video_frames", lambda **_: loaded)
    return predictor.init_state("frames")


def propagate(predictor, state, **options):
    """{k: (H, W) logits} of upstream."""
    return {k: logits[0, 0].numpy() for k, _, logits in predictor.propagate_in_video(state, **options)}


def mask_on(k):
    return disc(SHAPE, (50 + k, 30), 15)


def compare(found, expected, path):
    assert list(found) == list(path)
    for k in path:
        assert found[k].std() > 0.5, "logits that differ tell something"
        np.testing.assert_allclose(found[k], expected[k], atol=1e-4, err_msg=f"slice {k}")
    changes = [np.abs(found[a] - found[b]).max() for a, b in pairwise(path)]
    assert min(changes) > 0.1, "every slice has its own answer"


def test_forwards_equals_the_video_predictor_beyond_the_bank(film, predictor, state):
    """19 slices: more than the 6 memories and the 15 pointers that are kept."""
    predictor.add_new_mask(state, 0, 1, mask_on(0))
    path = range(1, LENGTH)
    compare(film.follow(path, {0: mask_on(0)}), propagate(predictor, state), path)


def test_backwards_equals_the_video_predictor(film, predictor, state):
    predictor.add_new_mask(state, 12, 1, mask_on(12))
    path = range(11, 2, -1)
    compare(film.follow(path, {12: mask_on(12)}), propagate(predictor, state, reverse=True), path)


@pytest.mark.parametrize("path", [range(3, 9), range(15, 19), range(1, -1, -1)])
def test_several_conditioning_slices_equal_the_video_predictor(film, predictor, state, path):
    """Those that lie ahead are attended to as well."""
    for k in (2, 14):
        predictor.add_new_mask(state, k, 1, mask_on(k))
    reverse, start = path.step < 0, path.start - path.step
    expected = propagate(
        predictor, state, start_frame_idx=start, max_frame_num_to_track=len(path), reverse=reverse
    )
    compare(film.follow(path, {2: mask_on(2), 14: mask_on(14)}), expected, path)


def test_corrective_clicks_on_the_way_equal_the_video_predictors(film, predictor, state):
    """Upstream is corrected after it has tracked the slice, and goes on from there."""
    points, labels = np.array([[20, 40], [90, 10]], np.float32), np.array([1, 0])
    predictor.add_new_mask(state, 2, 1, mask_on(2))
    before = propagate(predictor, state, max_frame_num_to_track=3)
    _, _, corrected = predictor.add_new_points_or_box(state, 5, 1, points, labels)
    after = propagate(predictor, state, start_frame_idx=6, max_frame_num_to_track=2)
    clicks = {5: Prompts(points=points, point_labels=labels)}
    path = range(3, 9)
    found = film.follow(path, {2: mask_on(2)}, lambda k: clicks.get(k, NO_CLICKS))
    compare(found, before | {5: corrected[0, 0].numpy()} | after, path)
    assert np.abs(before[5] - found[5]).max() > 0.1, "the clicks have an effect"


def test_nothing_outside_the_path_and_the_seeds_is_looked_at(film):
    asked = []

    def embedding(k):
        asked.append(k)
        return film.embeddings[k]

    steps = film.engine.track(
        range(6, 12), seeds={5: mask_on(5)}, embedding=embedding, clicks=lambda k: NO_CLICKS, length=LENGTH
    )
    assert not asked
    next(steps), next(steps)
    assert asked == [5, 6, 7], "one slice at a time, none ahead of what is asked for"


def test_memory_does_not_grow_with_the_path(film):
    """The bank of the paper: 6 memories of followed slices, 15 object pointers."""
    memory = SliceMemory(model=film.engine.model, length=100, reverse=False, storage=torch.device("cpu"))
    with torch.inference_mode():
        memory.condition(0, film.embeddings[0], mask_on(0))
        for k in range(1, 40):
            memory.follow(k, film.embeddings[k % LENGTH], None)
            assert len(memory._followed) <= 15
            assert sum("maskmem_features" in kept for kept in memory._followed.values()) <= 6
    assert min(memory._followed) == 39 - 14


def test_far_seeds_are_left_out_where_there_are_many(film):
    path = range(10, 11)
    near = {k: mask_on(k) for k in (7, 9, 11, 13)}
    far = {k: mask_on(k) for k in (0, 1, 2, 18, 19)}
    expected = film.follow(path, near)[10]
    np.testing.assert_array_equal(film.follow(path, near | far)[10], expected)
    assert np.abs(film.follow(path, {9: mask_on(9)})[10] - expected).max() > 1e-3


def test_calls_share_no_state(film):
    """Two readers follow two objects on the same slices, slice by slice in turns."""
    seeds = [{0: mask_on(0)}, {0: disc(SHAPE, (85, 50), 12)}]
    path = range(1, 5)
    alone = [film.follow(path, seed) for seed in seeds]
    steps = [
        film.engine.track(
            path, seeds=s, embedding=film.embeddings.__getitem__, clicks=lambda k: NO_CLICKS, length=LENGTH
        )
        for s in seeds
    ]
    for (k, one), (_, other) in zip(*steps, strict=True):
        np.testing.assert_allclose(one.logits[0], alone[0][k], atol=1e-4)
        np.testing.assert_allclose(other.logits[0], alone[1][k], atol=1e-4)
        assert np.abs(one.logits - other.logits).max() > 0.1


def test_where_the_network_sees_no_object_the_mask_is_empty(film):
    network = random_sam2()
    with torch.no_grad():
        network.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(-100.0)
    found = film.follow(range(1, 3), {0: mask_on(0)}, engine=Sam2Engine(model=network))
    assert all((logits <= -1000).all() for logits in found.values())


def test_small_holes_are_filled_and_large_ones_kept(components):
    logits = torch.full((1, 1, 24, 24), 3.0)
    logits[0, 0, 4:6, 4:8] = -1.0  # 8 pixels
    logits[0, 0, 6, 8] = -1.0  # one more that touches at a corner
    logits[0, 0, 15:17, 4:8] = -1.0
    filled = fill_holes(logits)
    torch.testing.assert_close(filled, sam2.utils.misc.fill_holes_in_mask_scores(logits, 8))
    assert int((filled == 0.1).sum()) == 8
