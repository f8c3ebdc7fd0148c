"""Rated candidates: the loss against its definition, and the store that keeps them."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from sam_infer.candidates import CandidateSet, by_thresholds
from sam_infer.errors import InputError
from sam_infer.types import Prompts
from trainers import preferences as module
from trainers.preferencefile import Entry, packed, unpacked
from trainers.preferences import PreferenceStore
from trainers.preferencestep import (
    BETAS,
    best_candidate_loss,
    coefficients,
    preference_loss,
    rank_weights,
    score_weights,
)

# The loss


def drawn(seed=0, items=1, count=4, size=(6, 7)):
    """Logits, reference logits and candidates (items, count, H, W) at random, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(items, *size, generator=generator).double() for _ in range(2))
    masks = torch.rand(items, count, *size, generator=generator) > 0.5
    return logits.requires_grad_(), reference, masks


def likelihood(logits, masks):
    """(B, N): log p(Y), the sum over pixels, of independent Bernoulli pixels."""
    pixels = torch.distributions.Bernoulli(logits=logits[:, None])
    return pixels.log_prob(masks.double()).sum((2, 3))


def by_definition(logits, reference, masks, weights):
    """(B,): equation 5 with a weight for each candidate, by way of the likelihoods."""
    gained = likelihood(logits, masks) - likelihood(reference, masks)
    return -torch.nn.functional.logsigmoid((weights * gained).sum(1))


def test_the_closed_form_is_the_published_loss():
    """With the number of pixels as temperature the margin is the published sum; gradients agree too."""
    logits, reference, masks = drawn()
    logits = (logits.detach() * 0.3).requires_grad_()  # margins of some units, where nothing saturates
    c = coefficients(masks)
    weights = torch.tensor([[1.0, 0.5, -0.5, -1.0]])
    expected = by_definition(logits, reference * 0.3, masks, weights).mean()
    found = preference_loss(logits, reference * 0.3, c, temperature=int((c != 0).sum()))
    assert found.loss.item() == pytest.approx(expected.item())
    assert 0.01 < found.loss.item() < 20
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (expected, found.loss)]
    assert torch.allclose(*slopes, atol=1e-6)
    assert torch.equal(slopes[1] != 0, c != 0), "what the candidates agree on is left alone"
    assert 0 < (c == 0).sum() < c.numel()


def test_the_margin_is_a_mean_over_what_is_preferred():
    better = torch.tensor([[[[1, 1, 1, 0]], [[1, 1, 0, 0]], [[1, 0, 0, 0]], [[1, 0, 0, 0]]]])
    c = coefficients(better)
    assert c.tolist() == [[[0, 1.5, 1, 0]]], "b1 (Y1 - Y4) + b2 (Y2 - Y3); the loosest is best: grow"
    reference = torch.zeros(1, 1, 4)
    found = preference_loss(reference + 0.2, reference, c, temperature=10.0)
    margin = 10 * (1.5 + 1) * 0.2 / 2
    assert found.margin == pytest.approx(margin)
    assert found.loss.item() == pytest.approx(np.log1p(np.exp(-margin)))
    assert found.band == 0.5
    assert preference_loss(reference, reference, c).loss.item() == pytest.approx(np.log(2))
    assert (coefficients(better.flip(1)) <= 0).all(), "the strictest is best: shrink"


def test_items_without_a_preference_do_not_count():
    logits, reference, masks = drawn(items=3)
    masks[1] = masks[1, :1]
    c = coefficients(masks)
    assert not c[1].any()
    found = preference_loss(logits, reference, c)
    alone = [preference_loss(logits[[n]], reference[[n]], c[[n]]).loss.item() for n in (0, 2)]
    assert found.loss.item() == pytest.approx(np.mean(alone))
    assert found.items == 2
    found.loss.backward()
    assert not logits.grad[1].any()
    none = preference_loss(logits, reference, torch.zeros_like(c))
    assert (none.loss.item(), none.items, none.margin, none.band) == (0, 0, 0, 0)
    logits.grad = None
    none.loss.backward()
    assert not logits.grad.any()


def test_a_step_down_the_gradient_moves_logits_to_the_better_candidates():
    logits, reference, masks = drawn(seed=3)
    before = likelihood(reference, masks)
    logits = reference.clone().requires_grad_()
    preference_loss(logits, reference, coefficients(masks)).loss.backward()
    gained = (likelihood(logits.detach() - 0.5 * logits.grad, masks) - before)[0]
    assert gained[0] > 0 > gained[3]
    assert gained[0] + gained[1] > gained[2] + gained[3]


def test_no_gradient_reaches_the_reference():
    logits, reference, masks = drawn()
    reference.requires_grad_()
    preference_loss(logits, reference, coefficients(masks)).loss.backward()
    assert reference.grad is None


@pytest.mark.parametrize(
    ("count", "weights"),
    [
        (2, [1, -1]),
        (3, [1, 0, -1]),
        (4, [1, 0.5, -0.5, -1]),
        (5, [1, 0.5, 0, -0.5, -1]),
        (6, [1, 0.75, 0.5, -0.5, -0.75, -1]),
        (8, [1, 5 / 6, 4 / 6, 0.5, -0.5, -4 / 6, -5 / 6, -1]),
    ],
)
def test_weights_of_other_numbers_of_candidates(count, weights):
    assert rank_weights(count).tolist() == pytest.approx(weights)
    assert rank_weights(4, (2.0, 1.0)).tolist() == [2, 1, -1, -2]
    assert BETAS == (1.0, 0.5)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_tied_candidates_share_the_weights_of_their_ranks(count):
    """Oracle: the mean weight over all orders that agree with the ratings; scipy's ranks where none tie."""
    ratings = torch.randint(1, 4, (30, count), generator=torch.Generator().manual_seed(count))
    found = score_weights(ratings)
    ranked = rank_weights(count).tolist()
    orders = list(itertools.permutations(range(count)))
    for row, own in zip(ratings[:8].tolist(), found.tolist(), strict=False):
        agreeing = [o for o in orders if all(row[a] >= row[b] for a, b in itertools.pairwise(o))]
        mean = [np.mean([ranked[order.index(n)] for order in agreeing]) for n in range(count)]
        assert own == pytest.approx(mean, abs=1e-6)
    distinct = torch.randperm(count)[None]
    places = rankdata(-distinct[0].numpy()).astype(int) - 1
    assert score_weights(distinct)[0].tolist() == pytest.approx([ranked[place] for place in places])
    assert not score_weights(torch.full((2, count), 3)).any(), "all tied: nothing is preferred"


def test_weighted_candidates_give_what_ordered_ones_give():
    _, _, masks = drawn(items=2)
    ranking = [2, 0, 3, 1]
    scores = torch.tensor([[3, 1, 4, 2]] * 2)
    weighted = coefficients(masks, weights=score_weights(scores))
    assert torch.allclose(weighted, coefficients(masks[:, ranking]))


def test_what_all_candidates_agree_on_is_exactly_nought_whatever_the_ties():
    ratings = torch.tensor(list(itertools.product(range(1, 4), repeat=5)))
    masks = torch.ones(len(ratings), 5, 2, 2, dtype=torch.bool)
    masks[:, :, 0] = False
    assert not coefficients(masks, weights=score_weights(ratings)).any()


def test_the_best_alone_is_cross_entropy():
    logits, _, masks = drawn(items=2)
    best = masks[:, 0]
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(best.double()).mean()
    assert best_candidate_loss(logits, best).item() == pytest.approx(expected.item(), rel=1e-6)


# The store


def candidates(seed=0, count=4):
    masks = np.random.default_rng(seed).random((count, 9, 12)) > 0.5
    return CandidateSet(masks=masks, source="masks", predicted_iou=tuple(n / 10 for n in range(count)))


def put(store, image="a", seed=0, **others):
    prompts = Prompts(
        points=np.array([[3, 4], [5, 6]], np.float32), point_labels=np.array([1, 0]), box=(1, 2, 7, 8)
    )
    given = dict(label="liver", k=3, candidates=candidates(seed), prompts=prompts, fingerprint="f1")
    return store.put_candidates(image, **{**given, **others})


@pytest.fixture
def store(tmp_path):
    return PreferenceStore(tmp_path / "preferences")


def test_candidates_come_back_as_they_were_put(store):
    made = by_thresholds(np.random.default_rng(0).random((9, 12), np.float32))
    name = put(store, "case.1", candidates=made)
    assert store.ids() == [], "they wait for an answer"
    store.answer(name, ranking=[2, 0, 1, 3], who="ann")
    again = PreferenceStore(store.folder)
    assert again.ids() == ["case.1"]
    (entry,) = again.all_rated()
    asked = entry.asked
    assert np.array_equal(asked.candidates.masks, made.masks)
    assert asked.candidates.thresholds == made.thresholds
    assert (asked.image_id, asked.label, asked.k, asked.fingerprint) == ("case.1", "liver", 3, "f1")
    assert asked.prompts.points.tolist() == [[3, 4], [5, 6]]
    assert asked.prompts.point_labels.tolist() == [1, 0]
    assert asked.prompts.box == (1, 2, 7, 8)
    assert (entry.answer.ranking, entry.answer.ratings, entry.answer.who) == ((2, 0, 1, 3), None, "ann")
    assert entry.answer.scores == (3, 2, 4, 1), "higher is better"
    assert again.find(name).answer == entry.answer
    assert json.dumps(again.get("case.1").record())


def test_equal_candidates_have_one_id_and_others_another(store):
    first = put(store)
    assert put(store) == first
    changes = [
        {"image": "b"}, {"seed": 1}, {"label": "spleen"}, {"k": 4}, {"fingerprint": "f2"},
        {"prompts": Prompts(box=(1, 2, 7, 8))},
    ]  # fmt: skip
    assert len({first, *(put(store, **change) for change in changes)}) == 7


def test_an_answer_can_be_changed_and_the_first_is_in_the_history(store, tmp_path):
    name = put(store)
    store.answer(name, ranking=[0, 1, 2, 3])
    store.answer(name, ratings=[5, 1, 3, 3], who="ben")
    (entry,) = store.get("a").rated.values()
    assert entry.answer.scores == (5, 1, 3, 3)
    assert put(store) == name, "asked for again"
    assert store.find(name).answer is not None, "what was answered stays"
    (kept,) = (tmp_path / "history" / "preferences" / "a").iterdir()
    assert unpacked(kept.read_bytes()).answer.ranking == (0, 1, 2, 3)
    assert store.remove("a")
    assert not store.remove("a")
    assert store.ids() == []
    assert len(list((tmp_path / "history" / "preferences" / "a").iterdir())) == 2
    with pytest.raises(InputError, match="no such candidates"):
        store.find(name)


def test_answers_come_in_their_order(store):
    names = [put(store, seed=seed) for seed in range(4)]
    for n, name in enumerate([*names[::-1], names[3]]):
        store.answer(name, ranking=[0, 1, 2, 3], who=str(n))
        answered = store.find(name)
        when = f"2024-01-01T00:00:0{n}.000+00:00"
        path = store.folder / "a" / f"{name}.npz"
        stamped = type(answered.answer)(ranking=(0, 1, 2, 3), ratings=None, who=str(n), when=when)
        path.write_bytes(packed(Entry(asked=answered.asked, answer=stamped)))
    assert [entry.answer.who for entry in store.get("a").rated.values()] == ["1", "2", "3", "4"]


def test_the_newest_wait_and_the_oldest_go(store, monkeypatch):
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    names = []
    for seed in range(5):
        names.append(put(store, seed=seed))
        if seed == 2:
            assert put(store, seed=0) == names[0], "asked for again, it is new again"
    assert len(list((store.folder / ".pending").iterdir())) == 3
    for n, name in enumerate(names):
        if n in (1, 2):
            with pytest.raises(InputError) as error:
                store.answer(name, ranking=[0, 1, 2, 3])
            assert error.value.status == 404
        else:
            store.answer(name, ranking=[0, 1, 2, 3])
    assert list((store.folder / ".pending").iterdir()) == [], "none waits that is answered"


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        ({}, "send one of the two"),
        ({"ranking": [0, 1, 2, 3], "ratings": [1, 1, 1, 1]}, "send one of the two"),
        ({"ranking": [0, 1, 2]}, "0 to 3 once"),
        ({"ranking": [0, 1, 2, 2]}, "0 to 3 once"),
        ({"ranking": [1, 2, 3, 4]}, "0 to 3 once"),
        ({"ranking": [0, 1, 2, 3.0]}, "0 to 3 once"),
        ({"ranking": [False, True, 2, 3]}, "0 to 3 once"),
        ({"ranking": "0123"}, "0 to 3 once"),
        ({"ranking": [0, 1, 2, [3]]}, "0 to 3 once"),
        ({"ratings": [1, 2, 3]}, "each of the 4"),
        ({"ratings": [0, 1, 2, 3]}, "from 1 (worst) to 5"),
        ({"ratings": [1, 2, 3, 6]}, "from 1 (worst) to 5"),
        ({"ratings": [1, 2, 3, True]}, "from 1 (worst) to 5"),
        ({"ratings": {"0": 1}}, "each of the 4"),
    ],
)
def test_answers_that_cannot_be(store, sent, text):
    name = put(store)
    with pytest.raises(InputError) as error:
        store.answer(name, **sent)
    assert text in str(error.value)
    assert store.ids() == []
    assert store.find(name).answer is None


@pytest.mark.parametrize("name", ["../a", "a/b", ".a", "..", ".pending", "", "a\0b"])
def test_no_file_outside_its_folder(store, name):
    for reach in (lambda: put(store, name), lambda: store.get(name), lambda: store.remove(name)):
        with pytest.raises(InputError):
            reach()


@pytest.mark.parametrize("name", ["", "../a", "*", "0" * 31, "0" * 33, "G" * 32, "0" * 32, "?" * 32])
def test_only_ids_of_candidates_are_looked_for(store, name):
    put(store)
    with pytest.raises(InputError) as error:
        store.find(name)
    assert error.value.status == 404


def test_a_damaged_file_is_told_of_and_stops_nothing(store):
    good, bad = put(store), put(store, seed=1)
    for name in (good, bad):
        store.answer(name, ranking=[3, 2, 1, 0])
    path = store.folder / "a" / f"{bad}.npz"
    path.write_bytes(path.read_bytes()[:-40])
    found = store.get("a")
    assert list(found.rated) == [good]
    assert found.damaged == (bad,)
    assert len(list(store.all_rated())) == 1
    with pytest.raises(InputError, match="are damaged") as error:
        store.find(bad)
    assert error.value.status == 422
    assert put(store, seed=1) == bad, "asked for again, they can be answered again"
    store.answer(bad, ratings=[1, 2, 3, 4])
    assert set(store.get("a").rated) == {good, bad}
    path.write_bytes(b"")
    assert store.remove("a"), "what is damaged can be removed"
    assert store.get("a").damaged == ()


def test_a_changed_byte_is_a_damaged_file_or_changes_nothing():
    from trainers.preferencefile import Answer, Asked

    asked = Asked(
        image_id="a", label="liver", k=0, candidates=candidates(), prompts=Prompts(), fingerprint="f"
    )
    answer = Answer(ranking=(0, 1, 2, 3), ratings=None, who="ann", when="")
    content = packed(Entry(asked=asked, answer=answer))
    damaged = 0
    for n in range(len(content)):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(content)
            changed[n] ^= flip
            try:
                entry = unpacked(bytes(changed))
            except ValueError:
                damaged += 1
            else:
                assert entry.answer == answer
                assert np.array_equal(entry.asked.candidates.masks, asked.candidates.masks)
    assert damaged > 1.5 * len(content), "most bytes matter"


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"\x80\x04]."])
def test_other_files_are_damaged_ones(content):
    with pytest.raises(ValueError):
        unpacked(content)
