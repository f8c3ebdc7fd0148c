"""What of a Segment Anything learns, against copies of the network that nothing was done to."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from segment_anything.modeling import Sam
from torch import nn

from sam_infer.engines.attention import fuse
from sam_infer.networks.sammed2d import _AdaptedBlock
from sam_infer.networks.samtiny import build_sam_tiny
from sam_infer.networks.tinyvit import _Attended, _ConvNorm
from sam_infer.tuning.methods import (
    METHODS,
    Tuning,
    learned_state,
    load_learned,
    merge,
    prepare,
    train_mode,
)
from sam_infer.tuning.splitqkv import SplitQkv, join, split
from tests.test_sam_engine import small_sam

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = METHODS["lora"]
MIX = Tuning(encoder="lora", decoder="full", rank=3)


class MedEncoder(nn.Sequential):
    """Two blocks of SAM-Med2D's class over patches of 16."""

    def __init__(self):
        made = {"use_rel_pos": True, "input_size": (4, 4)}
        super().__init__(
            nn.PixelUnshuffle(16), nn.Conv2d(768, 16, 1), Swap(0, 2, 3, 1),
            _AdaptedBlock(16, 2, window_size=3, use_rel_pos=True, input_size=(3, 3)),
            _AdaptedBlock(16, 2, window_size=0, **made), Swap(0, 3, 1, 2), nn.Conv2d(16, 256, 1),
        )  # fmt: skip


class MobileEncoder(nn.Sequential):
    """Two windowed blocks of MobileSAM's class over patches of 16."""

    def __init__(self):
        super().__init__(
            nn.PixelUnshuffle(16), _ConvNorm(768, 12),
            _Attended(12, 3, 4), _Attended(12, 3, 3), nn.Conv2d(12, 256, 1),
        )  # fmt: skip


class Swap(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


def with_encoder(encoder):
    """The small SAM around another encoder, for images of 64 pixels."""
    sam = small_sam()
    sam.image_encoder = encoder
    sam.prompt_encoder.image_embedding_size = (4, 4)
    return sam


def scrambled(sam):
    """The network with no parameter or statistic at its initial zero or one, so that each tells."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in sam.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
        for name, tensor in sam.named_buffers():
            if "running" in name:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return sam.eval()


def bases():
    torch.manual_seed(0)
    tiny = build_sam_tiny()
    return {
        "tiny": (scrambled(tiny), 256),
        "vit": (scrambled(small_sam()), 256),
        "med2d": (scrambled(with_encoder(MedEncoder())), 64),
        "mobile": (scrambled(with_encoder(MobileEncoder())), 64),
    }


BASES = bases()


def base(name):
    return deepcopy(BASES[name][0])


def answer(sam, name):
    """What the whole network says of a picture and a box: (1, 3, h, w) logits and (1, 3) predicted IoU."""
    side = BASES[name][1]
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    box = torch.tensor([[0.2, 0.3, 0.7, 0.6]]) * side
    sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
    logits, iou = sam.mask_decoder(
        image_embeddings=sam.image_encoder(image),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    return torch.cat([logits.flatten(), iou.flatten()])


@torch.no_grad()
def said(sam, name):
    return answer(sam, name)


def learn(sam, name):
    """Two steps, as the first moves only what a zero is multiplied with."""
    optimiser = torch.optim.Adam([one for one in sam.parameters() if one.requires_grad], lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        answer(sam, name).square().mean().backward()
        optimiser.step()


@cache
def untouched(name):
    """What the network says that nothing was done to."""
    return said(BASES[name][0], name)


def learns(sam):
    return {name for name, one in sam.named_parameters() if one.requires_grad}


TUNINGS = {**METHODS, "mix": MIX, "adapter and lora": Tuning(encoder="adapter", decoder="lora")}
every = pytest.mark.parametrize("name", BASES)
every_tuning = pytest.mark.parametrize("way", TUNINGS)
#: The largest network with the named methods only.
every_pair = pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in BASES for way in (METHODS if name == "tiny" else TUNINGS)]
)


@every_pair
def test_untrained_it_answers_as_before(name, way):
    sam = base(name)
    prepare(sam, TUNINGS[way], seed=0)
    torch.testing.assert_close(said(sam, name), untouched(name), rtol=1e-5, atol=1e-6)


@every_pair
def test_what_is_told_learns_and_is_put_back_and_merged(name, way):
    sam = base(name)
    prepare(sam, TUNINGS[way], seed=0)
    learn(sam, name)
    graded = {key for key, one in sam.named_parameters() if one.grad is not None}
    assert graded <= learns(sam)
    assert any(key.startswith("image_encoder.") for key in graded) == (TUNINGS[way].encoder != "frozen")
    wanted = said(sam, name)
    assert (wanted - untouched(name)).abs().max() > 1e-3
    state = learned_state(sam)
    fresh = base(name)
    prepare(fresh, TUNINGS[way], seed=9)
    load_learned(fresh, state)
    assert torch.equal(said(fresh, name), wanted)
    merge(fresh)
    torch.testing.assert_close(said(fresh, name), wanted, rtol=1e-4, atol=1e-5)
    assert not learns(fresh)
    assert not hasattr(fresh, "peft_config")
    assert not any(
        type(one).__module__.startswith("peft") or isinstance(one, SplitQkv) for one in fresh.modules()
    )
    added = {key for key in fresh.state_dict() if ".adapter." in key}
    assert fresh.state_dict().keys() - added == BASES[name][0].state_dict().keys()
    assert bool(added) == (TUNINGS[way].encoder == "adapter" and name != "med2d")
    for key, tensor in BASES[name][0].state_dict().items():
        assert fresh.state_dict()[key].shape == tensor.shape


@every
def test_low_rank_products_change_queries_and_values_alone(name):
    sam = base(name)
    prepare(sam, LORA, seed=0)
    assert all(".lora_" in one for one in learns(sam))
    learn(sam, name)
    merge(sam)
    before = BASES[name][0].state_dict()
    changed = {key for key, tensor in sam.state_dict().items() if not torch.equal(tensor, before[key])}
    packed = {key for key in before if key.endswith(".qkv.weight")}
    assert packed
    assert changed == packed | {
        key
        for key in before
        if key.startswith("mask_decoder") and key.endswith(("q_proj.weight", "v_proj.weight"))
    }
    for key in packed:
        width = before[key].shape[1]
        groups = 3 if name == "mobile" else 1  # TinyViT's output is viewed as heads, then chunked in three
        rows = (sam.state_dict()[key] != before[key]).any(1).view(groups, 3, width // groups)
        assert rows[:, [0, 2]].all()
        assert not rows[:, 1].any()


@pytest.mark.parametrize(
    ("name", "widths"), [("tiny", [192] * 4), ("vit", [32] * 2), ("med2d", [16] * 2), ("mobile", [12] * 2)]
)
def test_low_rank_products_have_the_size_of_their_rank(name, widths):
    sam = base(name)
    prepare(sam, Tuning(encoder="lora", decoder="lora", rank=5), seed=0)
    # A decoder of two layers has seven attentions; the two that attend to themselves are not narrowed.
    wide = sam.mask_decoder.transformer_dim
    decoder = 2 * 2 * 5 * (wide + wide) + 5 * 2 * 5 * (wide + wide // 2)
    encoder = sum(2 * 5 * (width + width) for width in widths)
    assert sum(one.numel() for one in sam.parameters() if one.requires_grad) == encoder + decoder


@every
def test_a_product_is_added_with_weight_one(name):
    sam = base(name)
    prepare(sam, LORA, seed=0)
    learn(sam, name)
    state = learned_state(sam)
    key = "mask_decoder.transformer.final_attn_token_to_image.v_proj"
    wanted = BASES[name][0].state_dict()[f"{key}.weight"] + (
        state[f"{key}.lora_B.default.weight"] @ state[f"{key}.lora_A.default.weight"]
    )
    merge(sam)
    torch.testing.assert_close(sam.state_dict()[f"{key}.weight"], wanted)


PROMPTED = ("prompt_encoder.", "mask_decoder.")


@every
def test_what_is_told_learns_and_nothing_else(name):
    names = {way: base(name) for way in ("decoder", "adapter", "full")}
    for way, sam in names.items():
        prepare(sam, METHODS[way], seed=0)
    own = {key for key, _ in BASES[name][0].named_parameters()}
    decoder = {key for key in own if key.startswith(PROMPTED)}
    assert learns(names["full"]) == own
    assert learns(names["decoder"]) == decoder
    adapted = learns(names["adapter"])
    assert decoder < adapted
    kind = ".Adapter." if name == "med2d" else ".adapter."
    assert all(key.startswith("image_encoder.") and kind in key for key in adapted - decoder)


@pytest.mark.parametrize("name", ["tiny", "vit", "mobile"])
def test_every_block_gets_one_adapter_of_its_width(name):
    sam = base(name)
    prepare(sam, METHODS["adapter"], seed=0)
    gates = [key for key in learns(sam) if key.endswith(".gate")]
    widths = {"tiny": [192] * 4, "vit": [32] * 2, "mobile": [12] * 2}[name]
    assert len(gates) == len(widths)
    counted = sum(
        2 * c + 2 * c * (c // 4) + (9 + 16) * c * c + 1 for c in widths
    )  # norm; squeeze and excite; 3 x 3 and 4 x 4 kernels; gate
    parts = dict(sam.image_encoder.named_parameters())
    assert sum(one.numel() for one in parts.values() if one.requires_grad) == counted
    learn(sam, name)
    again = deepcopy(sam)
    prepare(again, METHODS["adapter"], seed=0)
    assert learns(again) == learns(sam)
    assert torch.equal(said(again, name), said(sam, name))


def test_networks_with_adapters_train_those_they_have():
    sam = base("med2d")
    prepare(sam, METHODS["adapter"], seed=0)
    assert {type(one) for one in sam.modules()} == {type(one) for one in BASES["med2d"][0].modules()}
    learn(sam, "med2d")
    before = BASES["med2d"][0].state_dict()
    assert any(
        not torch.equal(one, before[key]) for key, one in learned_state(sam).items() if "Adapter" in key
    )


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (3, True)])
def test_a_split_projection_answers_as_the_packed_one(groups, bias):
    torch.manual_seed(0)
    packed = nn.Linear(6, 18, bias=bias)
    apart = SplitQkv(packed, groups)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(apart(x), packed(x))
    values = packed(x).view(2, 4, 5, groups, -1).chunk(3, dim=-1)
    for one, wanted in zip((apart.q, apart.k, apart.v), values, strict=True):
        torch.testing.assert_close(one(x), wanted.flatten(-2))
    joined = apart.joined()
    assert torch.equal(joined.weight, packed.weight)
    assert torch.equal(joined.bias, packed.bias) if bias else joined.bias is None


def test_attention_that_is_fused_keeps_what_it_learns():
    sam = base("vit")
    prepare(sam, LORA, seed=0)
    learn(sam, "vit")
    x = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(fuse(sam.image_encoder)(x), sam.image_encoder(x), atol=1e-5, rtol=1e-4)
    fused = base("vit")
    fused.image_encoder = fuse(fused.image_encoder)
    assert len(split(fused.image_encoder)) == 2
    join(fused)
    assert fused.state_dict().keys() == BASES["vit"][0].state_dict().keys()


def test_only_normalisations_that_learn_keep_statistics():
    statistics = {
        key
        for key in BASES["mobile"][0].state_dict()
        if key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    assert statistics
    for way, tuning in TUNINGS.items():
        sam = base("mobile")
        prepare(sam, tuning, seed=0)
        train_mode(sam)
        before = {key: tensor.clone() for key, tensor in sam.state_dict().items()}
        said(sam, "mobile")
        moved = {key for key, tensor in sam.state_dict().items() if not torch.equal(tensor, before[key])}
        assert moved == (statistics if way == "full" else set())
        assert moved == learned_state(sam).keys() & statistics


def test_training_mode_is_for_what_learns():
    sam = base("tiny")
    prepare(sam, METHODS["decoder"], seed=0)
    train_mode(sam)
    assert not any(one.training for one in sam.image_encoder.modules())
    assert all(one.training for one in sam.mask_decoder.modules())


@every_tuning
def test_what_is_learned_is_a_copy_of_parameters_and_no_constant(way):
    sam = base("vit")
    prepare(sam, TUNINGS[way], seed=0)
    state = learned_state(sam)
    assert state.keys() == learns(sam)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    learn(sam, "vit")
    assert all(torch.equal(tensor, kept[name]) and tensor.is_contiguous() for name, tensor in state.items())


def test_names_carry_those_of_the_modules_around():
    sam = base("vit")
    prepare(sam, LORA, seed=0)
    around = nn.ModuleDict({"sam": sam, "text": nn.Linear(2, 3)})
    assert learned_state(around).keys() == {f"sam.{name}" for name in learns(sam)} | {
        "text.weight",
        "text.bias",
    }


def test_a_seed_gives_the_same_numbers_and_leaves_torchs_alone():
    for tuning in (LORA, METHODS["adapter"]):
        states = []
        for seed in (3, 3, 4):
            sam = base("vit")
            before = torch.get_rng_state()
            prepare(sam, tuning, seed=seed)
            assert torch.equal(torch.get_rng_state(), before)
            states.append(learned_state(sam))
            torch.rand(1)
        same, other = [
            all(torch.equal(tensor, compared[name]) for name, tensor in states[0].items())
            for compared in states[1:]
        ]
        assert same
        assert not other


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.popitem() and state, r"is missing"),
        (lambda state: {**state, "novel": torch.zeros(1)}, r"novel is unknown"),
        (
            lambda state: {name: tensor[:1] for name, tensor in state.items()},
            r"is \(1, 32\), not \(8, 32\).* more",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, told):
    sam = base("vit")
    prepare(sam, LORA, seed=0)
    state = learned_state(sam)
    given = change({name: tensor + 1 for name, tensor in state.items()})
    with pytest.raises(ValueError, match=told):
        load_learned(sam, given)
    assert all(torch.equal(tensor, state[name]) for name, tensor in learned_state(sam).items())


def test_low_rank_adaptation_that_covers_nothing_is_an_error():
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    convolutions = with_encoder(nn.Conv2d(3, 256, 16, 16))
    with pytest.raises(ValueError, match="Conv2d has no queries and values"):
        prepare(convolutions, LORA, seed=0)
    with pytest.raises(ValueError, match="Conv2d has no perceptron"):
        prepare(convolutions, METHODS["adapter"], seed=0)
    with pytest.raises(ValueError, match="how Attended packs"):
        prepare(with_encoder(Attended()), LORA, seed=0)
    undecided = base("vit")
    undecided.mask_decoder.transformer = nn.Identity()
    with pytest.raises(ValueError, match="MaskDecoder has no queries and values"):
        prepare(undecided, LORA, seed=0)


def test_a_network_is_adapted_once_until_it_is_merged():
    sam = base("vit")
    prepare(sam, LORA, seed=0)
    with pytest.raises(ValueError, match="merge it"):
        prepare(sam, METHODS["decoder"], seed=0)
    merge(sam)
    prepare(sam, LORA, seed=0)
    assert isinstance(sam, Sam)


def test_products_that_are_no_numbers_are_not_merged():
    sam = base("vit")
    prepare(sam, LORA, seed=0)
    with torch.no_grad():
        next(one for one in sam.parameters() if one.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        merge(sam)


@pytest.mark.parametrize("way", TUNINGS)
def test_a_tuning_goes_through_json(way):
    import json

    assert Tuning(**json.loads(json.dumps(TUNINGS[way].record()))) == TUNINGS[way]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"encoder": "half"}, "encoder is one of frozen, lora, adapter, full, not 'half'"),
        ({"decoder": "frozen"}, "decoder is one of lora, full"),
        ({"rank": 0}, "rank is a whole number from 1"),
        ({"rank": 2.0}, "rank is a whole number from 1"),
        ({"rank": True}, "rank is a whole number from 1"),
    ],
)
def test_ways_that_do_not_exist_are_errors(wrong, told):
    with pytest.raises(ValueError, match=told):
        Tuning(**wrong)
