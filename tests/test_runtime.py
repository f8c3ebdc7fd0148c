"""Runtimes of the image encoder: what they compute, what they need, what they keep."""

import os
import time

import numpy as np
import pytest
import torch

from sam_infer.engines import graphs, runtime
from sam_infer.engines.attention import FusedAttention, fuse
from sam_infer.engines.location import VARIABLE
from sam_infer.engines.registry import create_engine
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.types import Prompts
from tests.test_sam_engine import SIDE, small_sam

CPU = torch.device("cpu")
EXACT = ("eager", "sdpa", "onnx", "openvino")
ROUNDED = ("bf16", "openvino-bf16")


@pytest.fixture(autouse=True)
def _threads(one_thread):
    """One thread."""


@pytest.fixture(scope="module")
def sam():
    """A SAM whose relative positions matter."""
    sam = small_sam()
    generator = torch.Generator().manual_seed(1)
    for block in sam.image_encoder.blocks:
        for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
            torch.nn.init.normal_(table, std=1, generator=generator)
    return sam


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((70, 110), dtype=np.float32)


@pytest.fixture(scope="module")
def reference(sam, image):
    """What segment-anything's own predictor computes."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(np.repeat(np.rint(image * 255).astype(np.uint8)[..., None], 3, axis=-1))
    return predictor.get_image_embedding()


@pytest.fixture
def graph_store(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path / "graphs"


def needs_bfloat16(name):
    if name in ROUNDED and not runtime._has_bfloat16(CPU):
        pytest.skip("this CPU has no bfloat16 arithmetic")


@pytest.mark.parametrize("heads_share", [True, False])
def test_fused_attention_equals_sams(sam, heads_share):
    attention = sam.image_encoder.blocks[1].attn
    if not heads_share:
        attention = type(attention)(dim=32, num_heads=4, use_rel_pos=False)
    tokens = torch.randn(3, SIDE // 16, SIDE // 16, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(FusedAttention(attention)(tokens), attention(tokens), atol=1e-5, rtol=1e-5)


def test_relative_positions_are_not_lost(sam):
    """The equality above would hold without them if they were zero."""
    attention = sam.image_encoder.blocks[1].attn
    tokens = torch.randn(1, 16, 16, 32)
    with torch.inference_mode():
        with_positions = attention(tokens)
        attention.use_rel_pos = False
        without = attention(tokens)
        attention.use_rel_pos = True
    assert not torch.allclose(with_positions, without, atol=1e-2)


def test_fusing_keeps_the_parameters_and_leaves_the_encoder_as_it_is(sam):
    encoder = sam.image_encoder
    fused = fuse(encoder)
    assert sum(isinstance(m, FusedAttention) for m in fused.modules()) == len(encoder.blocks)
    assert not any(isinstance(m, FusedAttention) for m in encoder.modules())
    ours, theirs = fused.state_dict(keep_vars=True), encoder.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert all(ours[key] is theirs[key] for key in ours)


@pytest.mark.parametrize("name", EXACT)
def test_exact_runtimes_equal_the_predictor(name, sam, image, reference, graph_store):
    engine = SamEngine(model=sam, runtime=name)
    found = engine.encode(image).features["image"]
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
    assert engine.fingerprint == SamEngine(model=sam, runtime="eager").fingerprint


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_runtimes_stay_near_and_never_share_embeddings(name, sam, image, reference, graph_store):
    needs_bfloat16(name)
    engine = SamEngine(model=sam, runtime=name)
    found = engine.encode(image).features["image"]
    assert found.dtype == torch.float32
    difference = (found - reference).abs()
    assert difference.max() > 1e-4
    assert difference.mean() < 0.02 * reference.std()
    exact = SamEngine(model=sam).fingerprint
    assert engine.fingerprint == f"{exact}-{name}"
    prompt = Prompts(box=(5.0, 6.0, 80.0, 60.0))
    assert engine.decode(engine.encode(image), [prompt])[0].logits.dtype == np.float32


def test_auto_is_fused_and_batches_equal_single_slices(sam, image):
    engine = SamEngine(model=sam)
    other = np.ascontiguousarray(image.T)
    together = engine.encode_batch([image, other])
    assert [e.image_size for e in together] == [(70, 110), (110, 70)]
    for one, alone in zip(together, (image, other), strict=True):
        torch.testing.assert_close(one.features["image"], engine.encode(alone).features["image"])
    assert any(isinstance(m, FusedAttention) for m in engine._encoder.modules())
    assert engine.encode_batch([]) == []


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_graphs_are_built_once_for_their_weights(name, sam, image, reference, graph_store, monkeypatch):
    SamEngine(model=sam, runtime=name).encode(image)
    assert [path.name.split("-")[0] for path in graph_store.iterdir()] == [name]
    with monkeypatch.context() as patch:
        patch.setattr(graphs, f"_export_{name}", None)  # not to be called again
        found = SamEngine(model=sam, runtime=name).encode(image)
    torch.testing.assert_close(found.features["image"], reference, atol=1e-4, rtol=1e-4)
    SamEngine(model=small_sam(), runtime=name).encode(image)
    assert len(list(graph_store.iterdir())) == 2


def test_a_graph_is_for_all_who_share_the_folder_and_killed_exports_are_swept(
    sam, image, graph_store, monkeypatch
):
    graph_store.mkdir()
    for name, age in (("old", 7200), ("new", 0)):
        folder = graph_store / f".onnx-{name}.x.tmp"
        folder.mkdir()
        (folder / "encoder.onnx").write_bytes(b"half")
        os.utime(folder, (time.time() - age,) * 2)
    monkeypatch.setattr(graphs, "_export_onnx", lambda encoder, example, folder: None)
    target = graphs._stored("onnx", "onnxruntime", None, 16, "digest", graphs._export_onnx)
    assert sorted(path.name for path in graph_store.iterdir()) == [".onnx-new.x.tmp", target.name]
    plain = graph_store / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


def test_a_failed_export_leaves_nothing(sam, image, graph_store, monkeypatch):
    def fail(encoder, example, folder):
        (folder / "encoder.onnx").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(graphs, "_export_onnx", fail)
    with pytest.raises(OSError, match="disk full"):
        SamEngine(model=sam, runtime="onnx").encode(image)
    assert list(graph_store.iterdir()) == []


def test_openvino_reports_to_nobody():
    """It would tell its maker of every import."""
    graphs.import_openvino()
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_what_cannot_run_is_refused_with_its_remedy(monkeypatch):
    with pytest.raises(InputError, match=r"engine.runtime = 'tensorrt': choose one of auto, eager, sdpa"):
        SamEngine(model=small_sam(), runtime="tensorrt")
    with pytest.raises(InputError, match="bundled has none to choose"):
        create_engine("bundled", runtime="bf16")
    with pytest.raises(InputError, match="runs on the CPU only"):
        runtime.find_runtime("openvino", torch.device("cuda"))
    monkeypatch.setattr(runtime, "find_spec", lambda package: None)
    with pytest.raises(
        InputError, match=r"onnx, onnxruntime is not installed; pip install 'samloop\[onnx\]'"
    ):
        runtime.find_runtime("onnx", CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    with pytest.raises(InputError, match="no bfloat16 arithmetic"):
        runtime.find_runtime("bf16", CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        runtime.find_runtime("compile", CPU)


@pytest.mark.slow
def test_compiled_equals_the_predictor(sam, image, reference):
    found = SamEngine(model=sam, runtime="compile").encode(image).features["image"]
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "bf16"])
def test_a_gpu_encodes_batches_and_gives_its_memory_back(name, sam, image, reference):
    from copy import deepcopy

    engine = SamEngine(model=deepcopy(sam), device="cuda", runtime=name)
    alone = engine.encode(image).features["image"].cpu()
    tolerance = 1e-3 if name == "auto" else 0.2
    torch.testing.assert_close(alone, reference, atol=tolerance, rtol=tolerance)
    before = torch.cuda.memory_reserved()
    together = engine.encode_batch([image] * 9)
    torch.testing.assert_close(together[8].features["image"].cpu(), alone, atol=tolerance, rtol=tolerance)
    kept = sum(e.nbytes for e in together)
    assert torch.cuda.memory_reserved() <= before + kept + (64 << 20)
