"""The one training loop, its steps, its checkpoints and its augmentation."""

import math

import numpy as np
import pytest
import torch

from sam_infer.networks.unet import build_unet
from tests.loop_data import (
    disc,
    one_thread,  # noqa: F401
)
from trainers.augment import Augmentation
from trainers.checkpoint import Checkpoint
from trainers.data import Slices
from trainers.loop import Settings, rate, train
from trainers.steps import mean_teacher_step, supervised_step

pytestmark = pytest.mark.usefixtures("one_thread")


def slices(count=6, size=48):
    pairs = [disc(seed, width=size, height=size) for seed in range(count)]
    return Slices(
        images=np.stack([p[0] for p in pairs]),
        labels=np.stack([p[1] for p in pairs]).astype(np.uint8),
        cases=np.arange(count),
    )


def run(seed, iterations=4, **kwargs):
    torch.manual_seed(0)
    step = supervised_step(slices(), classes=1, batch=2, augment=Augmentation())
    settings = Settings(iterations=iterations, epochs=2, seed=seed, **kwargs)
    return train(build_unet(labels=1), step, settings)


def weights(result):
    return torch.cat([t.flatten().float() for t in result.network.state_dict().values()])


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = run(1), run(1), run(2)
    assert torch.equal(weights(first), weights(again)) and first.losses == again.losses
    assert not torch.equal(weights(first), weights(other))


def test_the_average_differs_from_the_last_weights():
    assert not torch.equal(weights(run(1)), weights(run(1, ema=0.0)))


def test_run_stops_when_time_is_up():
    step = supervised_step(slices(), classes=1, batch=1)
    late = train(build_unet(labels=1), step, Settings(iterations=100000, max_seconds=0.3))
    assert 0 < late.iterations < 1000 and late.stopped == "time is up"


def test_schedule_rises_then_falls_and_a_lost_run_is_an_error():
    values = [rate(p / 100, warmup=0.1) for p in range(101)]
    assert max(values) == pytest.approx(1.0) and values[0] < 0.2 and values[-1] == pytest.approx(0.01)
    assert values[10:] == sorted(values[10:], reverse=True)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(build_unet(labels=1), lambda s: next(s.network.parameters()).sum() * math.nan, Settings())


def test_augmentation_moves_image_and_label_together_and_flips_only_when_asked():
    image, mask = disc(3, bright=250)
    images = torch.from_numpy(image)[None, None].float().repeat(16, 1, 1, 1) / 255
    labels = torch.from_numpy(mask)[None, None].float().repeat(16, 1, 1, 1)
    calm = {"gamma": 0.0, "contrast": 0.0, "brightness": 0.0, "noise": 0.0}
    moved, marked = Augmentation(**calm)(images, labels, torch.Generator().manual_seed(0))
    overlap = ((moved > 0.6) & (marked > 0)).sum() * 2 / ((moved > 0.6).sum() + (marked > 0).sum())
    assert overlap > 0.93 and not torch.equal(marked, labels) and set(marked.unique().tolist()) == {0.0, 1.0}
    still = {**calm, "rotation": 0.0, "scale": 0.0, "shift": 0.0, "bend": 0.0}
    same, _ = Augmentation(**still)(images, labels, torch.Generator().manual_seed(0))
    assert torch.allclose(same, images, atol=1e-5)
    flipping = Augmentation(**still, flip_horizontal=True)
    mirrored, _ = flipping(images, labels, torch.Generator().manual_seed(0))
    hits = [torch.allclose(m, images[0].flip(-1), atol=1e-5) for m in mirrored]
    assert 3 < sum(hits) < 13


class Killed(Exception):
    pass


def interrupted(seed, path, at, *, key="k", iterations=4, **kwargs):
    """A run that is killed during step ``at``, every step kept."""
    torch.manual_seed(0)
    inner = supervised_step(slices(), classes=1, batch=2, augment=Augmentation())

    def step(state):
        if state.iteration == at:
            raise Killed
        return inner(state)

    settings = Settings(iterations=iterations, epochs=2, seed=seed, **kwargs)
    return train(build_unet(labels=1), step, settings, checkpoint=Checkpoint(path=path, key=key, every=0))


def test_a_killed_run_goes_on_and_ends_with_the_weights_it_would_have_had(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        interrupted(1, path, 3)
    again, whole = interrupted(1, path, None), run(1)
    assert torch.equal(weights(again), weights(whole)) and again.losses == whole.losses
    assert again.iterations == whole.iterations == 4


def test_a_state_of_another_run_or_a_damaged_one_is_not_continued(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        interrupted(2, path, 3)
    other = interrupted(1, path, None, key="other")
    assert torch.equal(weights(other), weights(run(1)))
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(weights(interrupted(1, path, None)), weights(run(1)))


def test_the_time_of_a_killed_run_counts(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        interrupted(1, path, 3, iterations=1000)
    state = torch.load(path, weights_only=True)
    state["log"]["seconds"] = 1000.0
    torch.save(state, path)
    late = interrupted(1, path, None, iterations=1000, max_seconds=600.0)
    assert late.stopped == "time is up" and late.iterations == 3 and late.seconds >= 1000


def test_half_precision_learns_nearly_the_same():
    full, half = run(1, iterations=20), run(1, iterations=20, precision="bfloat16")
    assert half.losses[-1] == pytest.approx(full.losses[-1], rel=0.1) and half.losses != full.losses
    assert all(t.dtype == torch.float32 for t in half.network.state_dict().values())
    with pytest.raises(ValueError, match="precision = 'int8': choose one of float32, bfloat16"):
        Settings(precision="int8")


class Told(torch.nn.Module):
    """Answers with its one weight as the logit of class 1, and remembers what it saw."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        on = self.weight.expand(images.shape)
        return torch.cat([torch.zeros_like(on), on], dim=1)


def teacher_state(progress):
    from trainers.loop import State

    student, teacher = Told(1.0), Told(-1.0)
    state = State(network=student, average=teacher, generator=torch.Generator().manual_seed(0))
    state.progress = progress
    return state


def test_consistency_is_on_probabilities_of_unlabelled_slices_and_ramps_up():
    known, unknown = slices(2), slices(3)
    step = mean_teacher_step(known, unknown, classes=1, batch=4)

    def loss(progress):
        return float(step(teacher_state(progress)).detach())

    plain = loss(0.0)
    p, q = torch.sigmoid(torch.tensor(1.0)), torch.sigmoid(torch.tensor(-1.0))
    difference = float((p - q) ** 2)  # of both classes' probabilities
    for progress in (0.2, 0.6, 1.0):
        ramp = 0.1 * math.exp(-5 * (1 - progress) ** 2)
        assert loss(progress) - plain == pytest.approx(ramp * difference, rel=1e-4)
    assert loss(0.02) == plain, "the first thirtieth is without"


def test_the_teacher_sees_the_same_unlabelled_slices_with_noise_and_no_labels_of_them():
    known, unknown = slices(2), slices(3)
    blind = Slices(images=unknown.images, labels=np.full_like(unknown.labels, 7), cases=unknown.cases)
    state = teacher_state(0.5)
    mean_teacher_step(known, blind, classes=1, batch=4)(state)
    student, teacher = state.network.seen[0], state.average.seen[0]
    assert len(student) == 4 and len(teacher) == 2
    noise = teacher - student[2:]
    assert 0 < noise.abs().max() <= 0.2 + 1e-6
    assert state.average.weight.grad is None


def test_a_mean_teacher_learns_discs_from_two_labels():
    def dice_of(step):
        torch.manual_seed(0)
        found = train(build_unet(labels=1), step, Settings(iterations=40, ema=0.9, learning_rate=0.005))
        test = slices(12)
        with torch.inference_mode():
            mask = found.network(torch.from_numpy(test.images)[:, None].float() / 255).argmax(1).numpy()
        return 2 * (mask * test.labels).sum() / (mask.sum() + test.labels.sum())

    known = Slices(**{k: v[:2] for k, v in vars(slices(2)).items()})
    assert dice_of(mean_teacher_step(known, slices(8), classes=1, batch=4, weight=1.0)) > 0.6
