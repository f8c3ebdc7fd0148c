"""CLIP models from folders, their maps of saliency, and what becomes of these, without training."""

import hashlib
import json
import socket
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import softmax
from skimage.filters import threshold_otsu

from sam_infer.clip import regions, saliency
from sam_infer.clip.contrast import NONSENSE, Contrast, contrasted
from sam_infer.clip.crf import Pairs, crf, mean_field, unary
from sam_infer.clip.model import ClipModel
from sam_infer.clip.saliency import gradcam, gscorecam, m2ib
from sam_infer.clip.source import ClipFolder
from sam_infer.engines.catalog import FOLDERS
from sam_infer.engines.location import VARIABLE
from sam_infer.errors import InputError
from tests import tiny_clip

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "liver", "bright", "##er", "organ", "a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip.save(tmp_path_factory.mktemp("clip"), tiny_clip.build())


@pytest.fixture(scope="module")
def model(folder):
    return ClipModel(folder)


@pytest.fixture(scope="module")
def pixels():
    return tiny_clip.scene(np.random.default_rng(3))[0][:, :48]


def biomed(folder, *, width=64, tokenizer=True):
    """A folder as BiomedCLIP's: a timm trunk, a BERT whose configuration lies elsewhere, a tokenizer."""
    import open_clip
    from transformers import BertConfig

    scratch = folder / "scratch"
    BertConfig(
        vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 64 or 1,
        intermediate_size=48, max_position_embeddings=40,
    ).save_pretrained(scratch)  # fmt: skip
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
            "timm_proj": "linear", "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": str(scratch), "hf_tokenizer_name": "nobody/nothing", "hf_proj_type": "mlp",
            "hf_model_pretrained": False, "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 12,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    network = open_clip.model.CustomTextCLIP(**config).eval()
    config["text_cfg"] = {**config["text_cfg"], "hf_model_name": "nobody/nothing"}
    tiny_clip.save(folder, network, config)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        told = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return network


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_folder_like_biomed_clips_loads_alone(tmp_path, offline):
    network = biomed(tmp_path)
    model = ClipModel(tmp_path)
    found = model.text(["A brighter organ", "liver", "a liver " * 40])
    ids = [[2, 9, 6, 7, 8, 3], [2, 5, 3], [2, *[9, 5] * 5, 3]]
    tokens = torch.tensor([one + [0] * (12 - len(one)) for one in ids])
    with torch.no_grad():
        wanted = network.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.dtype == np.float32 and found.shape == (3, 24)
    image = np.random.default_rng(0).random((224, 224), np.float32)
    seen = torch.from_numpy((image - 0.5) / 0.25)[None, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.image(image), network.encode_image(seen, normalize=True)[0], atol=1e-5
        )
    assert gradcam(model, image, "liver").shape == (224, 224)
    with model.opened() as loaded:
        assert loaded.tower.grid == (14, 14) and len(loaded.tower.blocks) == 12


def test_a_text_tower_that_its_weights_do_not_tell_needs_its_configuration(tmp_path, offline):
    network = biomed(tmp_path, width=32)
    with pytest.raises(InputError, match=r"32 wide.*config\.json into the folder") as told:
        ClipModel(tmp_path).text(["liver"])
    assert told.value.status == 409
    (tmp_path / "config.json").write_bytes((tmp_path / "scratch" / "config.json").read_bytes())
    tokens = torch.tensor([[2, 5, 3] + [0] * 9])
    with torch.no_grad():
        wanted = network.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(ClipModel(tmp_path).text(["liver"]), wanted, atol=1e-5)


def test_nothing_is_fetched_for_a_tokenizer_that_is_not_there(tmp_path, offline):
    biomed(tmp_path, tokenizer=False)
    with pytest.raises(InputError, match="does not hold a CLIP model that can be used") as told:
        ClipModel(tmp_path).text(["liver"])
    assert told.value.status == 409


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_pickles_are_read_as_weights_only(folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    torch.save({"visual.proj": Evil()}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="does not hold a CLIP model"):
        ClipModel(tmp_path).text(["liver"])
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds none of open_clip_model\.safetensors"):
        ClipModel(tmp_path).text(["liver"])


def test_texts_and_slices_are_embedded_as_open_clip_does(folder, model):
    import open_clip

    network = tiny_clip.build().eval()
    texts = ["a bright disc", "a dark square"]
    tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
    image = np.random.default_rng(1).random((64, 64, 3), np.float32)
    with torch.no_grad():
        wanted = network.encode_text(tokens, normalize=True).numpy()
        seen = torch.from_numpy((image.transpose(2, 0, 1)[None] - 0.5) / 0.25)
        looked = network.encode_image(seen, normalize=True)[0].numpy()
    np.testing.assert_allclose(model.text(texts), wanted, atol=1e-5)
    np.testing.assert_allclose(model.image(image), looked, atol=1e-5)
    with torch.inference_mode():
        assert gradcam(ClipModel(folder), image, texts[0]) is not None, "also where gradients are off"
    content = (folder / "open_clip_pytorch_model.bin").read_bytes()
    assert model.fingerprint == hashlib.sha256(content).hexdigest()[:16]


def test_a_source_says_what_is_missing_until_the_files_are_there(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    source = ClipFolder()
    model, reason = source.current()
    assert model is None and "samloop weights fetch biomed_clip" in reason and "clip.weights" in reason
    target = tmp_path / "biomed_clip"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    model, reason = source.current()
    assert model.folder == target and reason == "" and source.current()[0] is model
    assert ClipFolder(folder).current()[0].folder == folder
    assert FOLDERS["biomed_clip"].size > 780_000_000


def test_gradcam_is_that_of_pytorch_grad_cam(model, pixels):
    from pytorch_grad_cam import GradCAM

    square = np.ascontiguousarray(np.pad(pixels, ((0, 0), (0, 16))))
    found = gradcam(model, square, "a bright disc")
    text = torch.from_numpy(model.text(["a bright disc"])[0])
    with model.opened() as loaded:
        network = loaded.network.visual

        def reshaped(tokens):
            return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 8, 8)

        def target(features):
            return torch.nn.functional.normalize(features, dim=-1) @ text

        block = network.transformer.resblocks[-1]
        with GradCAM(model=network, target_layers=[block.ln_1], reshape_transform=reshaped) as cam:
            (wanted,) = cam(input_tensor=loaded.inputs(square).requires_grad_(), targets=[target])
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def naive_gscorecam(model, pixels, text, channels):
    """As MedCLIP-SAM writes it, channel by channel, through `torch.func` instead of hooks."""
    wanted = torch.from_numpy(model.text([text])[0])
    with model.opened() as loaded:
        network, image = loaded.network, loaded.inputs(pixels)
        visual = network.visual

        def tail(read):
            block = visual.transformer.resblocks[-1]
            after = tokens + block.attn(read, read, read, need_weights=False)[0]
            after = after + block.mlp(block.ln_2(after))
            features = visual.ln_post(after)[:, 0] @ visual.proj
            unit = features / features.norm(dim=-1, keepdim=True)
            return (network.logit_scale.exp() * unit @ wanted).sum()

        tokens = visual._embeds(image)
        for block in visual.transformer.resblocks[:-1]:
            tokens = block(tokens)
        read = visual.transformer.resblocks[-1].ln_1(tokens)
        gradient = torch.func.grad(tail)(read)[0, 1:].mean(0).numpy()
        maps = read[0, 1:].detach().numpy().T.reshape(-1, 8, 8)
        scores = np.zeros(len(maps))
        for n in np.argsort(-gradient)[:channels]:
            up = torch.nn.UpsamplingBilinear2d(image.shape[2:])(torch.from_numpy(maps[n])[None, None])
            up = (up - up.min()) / (up.max() - up.min() + 1e-6)
            with torch.no_grad():
                unit = network.encode_image(image * up, normalize=True)
            scores[n] = float(network.logit_scale.exp() * unit[0] @ wanted)
    return np.maximum((softmax(scores)[:, None, None] * maps).sum(0), 0)


def test_gscorecam_is_that_of_a_loop_over_channels(model, pixels):
    grid = naive_gscorecam(model, pixels, "a dark square", 20)
    found = gscorecam(model, pixels, "a dark square", channels=20)
    up = torch.nn.functional.interpolate(torch.from_numpy(grid)[None, None], pixels.shape, mode="bilinear")
    wanted = ((up - up.min()) / (up.max() - up.min()))[0, 0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert gscorecam(model, pixels, "a dark square").shape == pixels.shape, "fewer channels than 300"


def test_m2ib_is_that_of_a_bottleneck_written_out(model, pixels, monkeypatch):
    found = m2ib(model, pixels, "a bright disc", seed=4)
    np.testing.assert_array_equal(found, m2ib(model, pixels, "a bright disc", seed=4))
    assert not np.array_equal(found, m2ib(model, pixels, "a bright disc", seed=5))
    text = torch.from_numpy(model.text(["a bright disc"])[0])
    with model.opened() as loaded:
        visual = loaded.network.visual
        with torch.no_grad():
            x = visual._embeds(loaded.inputs(pixels))
            for block in visual.transformer.resblocks[:2]:
                x = block(x)
        alpha = torch.full(x.shape, 5.0, requires_grad=True)
        optimiser = torch.optim.Adam([alpha], lr=1.0)
        generator = torch.Generator().manual_seed(4)
        for _ in range(10):
            mu, var = alpha.sigmoid() * x, (1 - alpha.sigmoid()) ** 2
            kl = -0.5 * (1 + var.log() - mu**2 - var)
            t = mu + var.sqrt() * torch.randn((10, *x.shape[1:]), generator=generator)
            features = visual.ln_post(visual.transformer.resblocks[2](t))[:, 0] @ visual.proj
            loss = kl.mean() - torch.cosine_similarity(features, text[None]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        grid = kl.detach()[0, 1:].sum(-1).reshape(1, 1, 8, 8)
    up = torch.nn.functional.interpolate(grid, pixels.shape, mode="bilinear")
    np.testing.assert_allclose(found, ((up - up.min()) / (up.max() - up.min()))[0, 0].numpy(), atol=5e-3)
    with pytest.raises(ValueError, match="block = 2: choose one from 0 to 1"):
        m2ib(model, pixels, "a bright disc", block=2)


def test_behind_the_last_blocks_second_norm_no_patch_is_read(model, pixels):
    """Why MedCLIP-SAM's layer is not the default: there, the text chooses nothing."""
    assert gradcam(model, pixels, "a bright disc", second=True) is None
    with model.opened() as loaded:
        text = torch.from_numpy(np.eye(32, dtype=np.float32)[0])
        _, at_patches = saliency._tapped(loaded, loaded.inputs(pixels), text, second=True)
        _, before = saliency._tapped(loaded, loaded.inputs(pixels), text, second=False)
    assert not at_patches.any() and before.abs().min() > 0


@pytest.mark.parametrize("method", saliency.SALIENCIES.values())
def test_maps_fill_their_range_on_the_slice_and_leave_no_hook(model, pixels, method):
    found = method(model, pixels, "a bright disc")
    assert found.shape == pixels.shape and found.dtype == np.float32
    assert found.min() == 0 and found.max() == 1
    with model.opened() as loaded:
        assert not any(module._forward_hooks for module in loaded.network.modules())
        assert not any(value.requires_grad for value in loaded.network.parameters())


def naive_mean_field(map_, colour, scale):
    """One step over all pairs of pixels, in two loops."""
    size = map_.shape
    cells = [(r, c) for r in range(size[0]) for c in range(size[1])]
    q = softmax(-np.array([unary(map_)[at] for at in cells]), axis=1)
    heard = np.zeros_like(q)
    for weight, kernel in (
        (3, lambda d, v: np.exp(-d / (2 * 3**2))),
        (5, lambda d, v: np.exp(-d / (2 * 60**2) - v / (2 * 5**2))),
    ):
        table = np.zeros((len(cells), len(cells)))
        for a, (r, c) in enumerate(cells):
            for b, (s, d) in enumerate(cells):
                apart = ((r - s) * scale[0]) ** 2 + ((c - d) * scale[1]) ** 2
                table[a, b] = kernel(apart, ((colour[r, c] - colour[s, d]) ** 2).sum())
        root = 1 / np.sqrt(table.sum(1))
        heard += weight * (root[:, None] * table * root) @ q
    energies = np.array([unary(map_)[at] for at in cells])
    return softmax(heard - energies, axis=1).reshape(*size, 2)


def test_the_random_field_is_that_of_two_loops():
    rng = np.random.default_rng(0)
    map_, colour = rng.random((7, 9)), rng.random((7, 9, 3)) * 20
    found = mean_field(unary(map_), Pairs.of(colour, (2.0, 1.5)))
    np.testing.assert_allclose(found, naive_mean_field(map_, colour, (2.0, 1.5)), atol=1e-4)


def test_unary_energies_are_medclip_sams():
    a = np.array([0.0, 0.3, 1.0])
    for column, one in zip(unary(a).T, (1 - a, a), strict=True):
        np.testing.assert_allclose(column, -np.log(one + 1e-8) / (1.05 / (1 + np.exp(-one))))


def test_the_random_field_follows_the_slices_edges():
    truth = tiny_clip.drawn("bright disc", 70, 60, side=120, radius=25)
    pixels = np.where(truth, 0.8, 0.2).astype(np.float32)
    rows, columns = np.mgrid[:120, :120]
    blurred = np.exp(-((columns - 74) ** 2 + (rows - 56) ** 2) / (2 * 22**2)).astype(np.float32)

    def iou(mask):
        return (mask & truth).sum() / (mask | truth).sum()

    found = crf(blurred, pixels)
    assert found.shape == truth.shape and found.dtype == bool
    assert iou(found) > 0.9 > iou(blurred > 0.5)
    colour = np.repeat(pixels[..., None], 3, axis=-1)
    np.testing.assert_array_equal(crf(blurred, colour), found)


def test_two_clusters_are_otsus(pixels):
    rng = np.random.default_rng(0)
    map_ = np.clip(np.where(pixels > 0.6, 0.8, 0.2) + rng.normal(0, 0.1, pixels.shape), 0, 1)
    map_ = map_.astype(np.float32)
    found = regions.kmeans(map_, pixels)
    assert (found != (map_ > threshold_otsu(map_, nbins=1000))).mean() < 0.005
    assert not regions.kmeans(np.full((8, 8), 0.5, np.float32), pixels).any()


def test_parts_and_the_prompts_inside_them():
    mask = np.zeros((20, 30), bool)
    mask[2:10, 3:9], mask[12:18, 20:26], mask[1, 28] = True, True, True
    sizes = {
        keep: [int(one.sum()) for one in regions.kept_parts(mask, keep)] for keep in ("largest", "large", 3)
    }
    assert sizes == {"largest": [48], "large": [48, 36], 3: [48, 36, 1]}
    assert regions.kept_parts(np.zeros((4, 4), bool)) == []
    with pytest.raises(ValueError, match="keep = 0"):
        regions.kept_parts(mask, 0)
    first = regions.kept_parts(mask)[0]
    part = regions.clip_part(first, points=200, rng=np.random.default_rng(0))
    assert part.box == part.prompts.box == (3, 2, 8, 9) and part.prompts.point_labels.all()
    x, y = part.prompts.points.astype(int).T
    assert first[y, x].all() and part.prompts.points.dtype == np.float32
    assert len(set(zip(x, y, strict=True))) > 40, "all over the part"
    again = regions.clip_part(first, points=200, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again.prompts.points, part.prompts.points)
    assert not len(regions.clip_part(first, points=0, rng=np.random.default_rng(0)).prompts.points)


def test_a_map_is_held_against_those_of_nonsense():
    rng = np.random.default_rng(0)
    map_ = rng.random((10, 10), np.float32)
    other = rng.random((10, 10), np.float32)
    judge = partial(contrasted, map_, map_ > 0.5)
    same, unlike = (map_ * 0.5, map_ > 0.5), (other, other > 0.5)
    verdict = judge([same, unlike, same], Contrast())
    assert not verdict.depends and verdict.iou == 1 and verdict.correlation == pytest.approx(1)
    verdict = judge([unlike, None, same], Contrast())
    assert verdict.depends and verdict.correlation == pytest.approx(
        np.corrcoef(map_.ravel(), other.ravel())[0, 1]
    )
    region = judge([(other, map_ > 0.5)] * 3, Contrast())
    assert not region.depends and region.iou == 1 and region.correlation < 0.5, "the region alone is enough"
    assert judge([same] * 3, Contrast(correlation=1.01, iou=1.01)).depends
    assert len(NONSENSE) % 2
