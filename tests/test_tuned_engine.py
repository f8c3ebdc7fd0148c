"""What a SAM learned as a file of its own, and the engine that serves it as soon as it is published."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.base import Engine
from sam_infer.engines.registry import create_engine
from sam_infer.engines.sam import SamEngine
from sam_infer.engines.tuned import TunedEngine
from sam_infer.intensity import EIGHT_BIT
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.methods import METHODS, Tuning
from sam_infer.tuning.tunedfile import TunedSam, load_tuned, save_tuned, untuned
from sam_infer.types import Prompts
from sam_infer.volumes import read_image
from tests.conftest import disc, save_png
from tests.test_sam_engine import small_sam

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = {"disc": 5}
BOX = Prompts(box=(12, 8, 30, 26))
every_method = pytest.mark.parametrize("method", METHODS)


@cache
def base():
    return SamEngine(name="small", model=small_sam())


def picture():
    """(30, 44) float32 in 0..1 with a bright disc."""
    noise = np.random.default_rng(0).normal(0.2, 0.05, (30, 44))
    return np.clip(noise + 0.6 * disc((30, 44), (21, 17), 9), 0, 1).astype(np.float32)


def learned(tuning, *, seed=1, labels=LABELS, **extras):
    """A model every learned number of which was moved."""
    network = SamLearner(base().model, tuning=tuning, seed=0, **extras)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    training = {"round": 3, "prompts": "unet"}
    own = base()
    return TunedSam(
        network=network,
        base=own.name,
        digest=own.digest,
        labels=labels,
        window={"ct": None},
        training=training,
    )


def said(engine, *prompts):
    """The logits and predicted IoU of an engine, in one array."""
    found = engine.decode(engine.encode(picture()), prompts or [BOX])
    return np.concatenate([np.concatenate([one.logits.ravel(), one.iou]) for one in found])


@every_method
def test_a_file_gives_the_model_back(tmp_path, method):
    model = learned(METHODS[method], text=6, attention=True)
    model = replace(model, texts={"encoder": "e-1", "descriptions": {"disc": "round"}})
    save_tuned(tmp_path / "a.safetensors", model)
    again = load_tuned(tmp_path / "a.safetensors", SamEngine(name="small", model=small_sam()))
    for name in ("base", "digest", "labels", "window", "training", "texts"):
        assert getattr(again, name) == getattr(model, name), name
    assert again.network.tuning == METHODS[method] and again.size == model.size == 256
    assert again.fingerprint != model.fingerprint == ""
    text = np.linspace(-1, 1, 6, dtype=np.float32)
    prompts = BOX, replace(BOX, text=text), replace(BOX, attention=picture()), Prompts(mask_logits=picture())
    kept, fresh = said(model.engine(base()), *prompts), said(again.engine(base()), *prompts)
    np.testing.assert_allclose(fresh, kept, atol=1e-5)
    assert np.abs(kept[: len(said(base()))] - said(base())).max() > 0.01, "something was learned at all"


@every_method
def test_a_file_holds_what_learned_and_nothing_of_the_base(tmp_path, method):
    model = learned(METHODS[method], text=6)
    save_tuned(tmp_path / "a.safetensors", model)
    kept = load_file(tmp_path / "a.safetensors")
    assert kept.keys() == {name for name, one in model.network.named_parameters() if one.requires_grad}
    encoder = {name for name in kept if name.startswith("sam.image_encoder.")}
    own = {f"sam.{name}" for name, _ in base().model.named_parameters()}
    kinds = {"decoder": not encoder, "full": len(kept) == len(own) + 2, "lora": not encoder & own}
    assert kinds.get(method, encoder and not encoder & own), sorted(encoder)[:5]


def test_a_model_of_another_base_is_refused_and_both_are_named(tmp_path):
    save_tuned(tmp_path / "a.safetensors", learned(METHODS["decoder"]))
    sam = small_sam()
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight += 1
    other = SamEngine(name="other", model=sam)
    told = rf"tuned on small with weights {base().digest[:12]}.* is other with weights {other.digest[:12]}"
    with pytest.raises(ValueError, match=told):
        load_tuned(tmp_path / "a.safetensors", other)


def spoilt(path, how):
    content = path.read_bytes()
    if how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "no file of this kind":
        path.write_bytes(b"weights")
    else:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        state = load_file(path)
        if how == "a tensor is missing":
            state.pop(min(state))
        elif how == "another shape":
            state[min(state)] = torch.zeros(3)
        else:
            header["format"] = "samloop-unet/1"
        save_file(state, path, metadata=header)


@pytest.mark.parametrize(
    "how", ["cut short", "no file of this kind", "a tensor is missing", "another shape", "another format"]
)
def test_a_damaged_file_is_named_and_the_base_answers(tmp_path, how):
    path = tmp_path / "sam.safetensors"
    save_tuned(path, learned(METHODS["lora"]))
    spoilt(path, how)
    with pytest.raises(ValueError, match=r"not a usable tuned SAM file .*; publish a model again"):
        load_tuned(path, base())
    engine = TunedEngine(base=base(), path=path, labels=LABELS)
    assert engine.current()[0] is None
    assert "its weights cannot be used" in engine.current()[1]
    assert np.array_equal(said(engine), said(base()))
    with pytest.raises(FileNotFoundError, match="train or publish first"):
        load_tuned(tmp_path / "nothing", base())


def test_what_is_published_answers_from_then_on(tmp_path):
    path = tmp_path / "sam.safetensors"
    engine = TunedEngine(base=base(), path=path, labels=LABELS)
    assert isinstance(engine, Engine)
    assert engine.name == "small" and engine.fingerprint == base().fingerprint
    assert "POST /train/sam_finetune" in engine.current()[1]
    seen = [said(engine)]
    assert np.array_equal(seen[0], said(base()))
    prints = [engine.fingerprint]
    for seed, method in ((1, "decoder"), (2, "adapter")):
        model = learned(METHODS[method], seed=seed)
        save_tuned(path, model)
        seen.append(said(engine))
        np.testing.assert_allclose(seen[-1], said(model.engine(base())), atol=1e-5)
        prints.append(engine.fingerprint)
        assert engine.current()[0].fingerprint in prints[-1]
    assert len(set(prints)) == 3 and all(np.abs(a - b).max() > 0.1 for a, b in pairwise(seen))
    path.unlink()
    assert np.array_equal(said(engine), seen[0]) and engine.fingerprint == prints[0]


def test_a_model_of_other_labels_does_not_answer(tmp_path):
    path = tmp_path / "sam.safetensors"
    save_tuned(path, learned(METHODS["decoder"], labels={"ball": 5}))
    engine = TunedEngine(base=base(), path=path, labels=LABELS)
    assert np.array_equal(said(engine), said(base())) and engine.fingerprint == base().fingerprint
    assert engine.current()[1].startswith(
        "the trained model has labels {'ball': 5}, the project has {'disc': 5}"
    )


def test_requests_in_flight_end_with_the_model_that_they_began_with(tmp_path, image, store):
    """An embedding of one encoder is kept for that encoder, also where it is replaced meanwhile."""
    path = tmp_path / "sam.safetensors"
    engine = TunedEngine(base=base(), path=path, labels=LABELS)

    class Publishing(SliceEncoder):
        def slice_values(self, *args, **kwargs):
            if not path.exists():
                save_tuned(path, learned(METHODS["full"]))
            return super().slice_values(*args, **kwargs)

    found = Publishing(engine=engine, store=store).embedding(image, 0, EIGHT_BIT)[0].features["image"]
    kept = SliceEncoder(engine=base(), store=store).embedding(image, 0, EIGHT_BIT)[0].features["image"]
    values = EIGHT_BIT.apply(image.array[:, :, 0].T)
    torch.testing.assert_close(found, engine.encode(values).features["image"], atol=0.01, rtol=0.01)
    torch.testing.assert_close(kept, base().encode(values).features["image"], atol=0.01, rtol=0.01)
    assert (found - kept).abs().max() > 0.1


@pytest.fixture
def image(tmp_path):
    return read_image(save_png(tmp_path / "picture.png", (picture() * 255).astype(np.uint8)))


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(folder=tmp_path / "kept", limit=1 << 30, reserve=0)


@pytest.fixture
def encodings(monkeypatch):
    """Counts what SAMs encode."""
    counted, encode = [], SamEngine.encode
    monkeypatch.setattr(SamEngine, "encode", lambda self, image: counted.append(self) or encode(self, image))
    return counted


def test_a_new_decoder_leaves_all_embeddings_as_they_are(tmp_path, image, store, encodings):
    path = tmp_path / "sam.safetensors"
    engine = TunedEngine(base=base(), path=path, labels=LABELS)
    encoder = SliceEncoder(engine=engine, store=store)
    before = encoder.decode_history(image, 0, EIGHT_BIT, BOX, zoom=False)
    assert len(encodings) == 1
    save_tuned(path, learned(METHODS["decoder"]))
    after = encoder.decode_history(image, 0, EIGHT_BIT, BOX, zoom=False)
    assert len(encodings) == 1, "in memory"
    assert np.abs(after.logits - before.logits).max() > 0.1, "and the new decoder answers"
    for other in (engine, base(), load_tuned(path, base()).engine(base())):
        assert SliceEncoder(engine=other, store=store).embedding(image, 0, EIGHT_BIT)[1], "and on disk"
    assert len(encodings) == 1 and len(list((tmp_path / "kept").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("method", ["lora", "adapter", "full"])
def test_a_new_encoder_has_embeddings_of_its_own_and_the_bases_stay(
    tmp_path, image, store, encodings, method
):
    path = tmp_path / "sam.safetensors"
    engine = TunedEngine(base=base(), path=path, labels=LABELS)
    encoder = SliceEncoder(engine=engine, store=store)
    first = encoder.embedding(image, 0, EIGHT_BIT)[0].features["image"]
    save_tuned(path, learned(METHODS[method]))
    second, known = encoder.embedding(image, 0, EIGHT_BIT)
    assert not known and len(encodings) == 2 and (second.features["image"] - first).abs().max() > 0.01
    assert engine.encoding.fingerprint == engine.fingerprint != base().fingerprint
    path.unlink()
    third, known = encoder.embedding(image, 0, EIGHT_BIT)
    assert known and torch.equal(third.features["image"], first) and len(encodings) == 2
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 2


def test_what_was_not_learned_is_not_taken(tmp_path):
    text, path = replace(BOX, text=np.ones(6, np.float32)), tmp_path / "sam.safetensors"
    attention = replace(BOX, attention=picture())
    save_tuned(path, learned(METHODS["decoder"]))
    for engine in (base(), TunedEngine(base=base(), path=path, labels=LABELS)):
        for prompt in (text, attention):
            with pytest.raises(ValueError, match="small did not learn to be prompted with text or attention"):
                said(engine, prompt)
    with pytest.raises(ValueError, match="did not learn to be prompted with attention"):
        said(learned(METHODS["decoder"], text=6).engine(base()), attention)
    with pytest.raises(ValueError, match="did not learn to be prompted with text"):
        said(learned(METHODS["decoder"], attention=True).engine(base()), text)


def test_text_and_attention_change_little_before_anything_is_learned():
    tiny = create_engine("sam_tiny")
    network = SamLearner(tiny.model, tuning=METHODS["decoder"], text=6, attention=True)
    engine = replace(untuned(tiny, labels=LABELS, training={}), network=network).engine(tiny)
    text = np.random.default_rng(0).normal(size=6).astype(np.float32)
    embedding = tiny.encode(picture())
    plain, worded, shown = (
        engine.decode(embedding, [one])[0]
        for one in (BOX, replace(BOX, text=text), replace(BOX, attention=picture()))
    )
    assert np.array_equal(shown.logits, plain.logits)
    assert np.array_equal(tiny.decode(embedding, [BOX])[0].logits, plain.logits)
    assert (worded.mask() ^ plain.mask()).sum() <= 0.02 * plain.mask().sum()
    assert not np.array_equal(worded.logits, plain.logits), "but it is looked at"


def test_an_untuned_model_answers_as_its_base():
    assert np.array_equal(said(untuned(base(), labels=LABELS, training={}).engine(base())), said(base()))


def test_learning_leaves_the_base_as_it_is_and_shares_what_stands_still():
    sam = small_sam()
    before = {name: value.clone() for name, value in sam.state_dict().items()}
    network = SamLearner(sam, tuning=METHODS["decoder"])
    for own, its in zip(sam.image_encoder.parameters(), network.sam.image_encoder.parameters(), strict=True):
        assert own.data_ptr() == its.data_ptr() and own.requires_grad and not its.requires_grad
    network.double()  # as moving it to a device does, in place
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in sam.state_dict().items())
    assert {value.dtype for value in sam.parameters()} == {torch.float32}


def test_a_sam_that_was_first_used_by_a_click_can_learn():
    """Clicks run in inference mode; parameters that are loaded there could not be written to again."""
    engine = create_engine("sam_tiny")
    engine.encode(picture())
    for tuning in (*METHODS.values(), Tuning(encoder="lora", decoder="full")):
        network = SamLearner(engine.model, tuning=tuning)
        assert not any(value.is_inference() for value in network.state_dict(keep_vars=True).values())
        network.load_state_dict(network.state_dict())
