"""Reading checkpoint files: every format, every wrapper, and a clear answer to every wrong file."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sam_infer.engines import architectures
from sam_infer.engines.architectures import Architecture, identify
from sam_infer.engines.checkpoint import load_network, read_state
from sam_infer.engines.sam2model import build_sam2
from sam_infer.errors import InputError
from tests.sam_states import empty, table

SMALL = Architecture(label="a small network", build=lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
SAM_NAMES = {
    "vit_b": architectures.VIT_B,
    "vit_l": architectures.VIT_L,
    "vit_h": architectures.VIT_H,
    "mobile_sam": architectures.MOBILE_SAM,
    "sam_med2d": architectures.SAM_MED2D,
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SMALL.build()


@pytest.fixture(scope="module")
def state(network):
    return network.state_dict()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def with_optimizer(network):
    """As SAM-Med2D's training program saves: the optimizer itself is pickled, after a step."""
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {"model": network.state_dict(), "optimizer": optimizer, "epoch": 3}


SAVED = {
    "plain": lambda network, state: state,
    "wrapped as model": lambda network, state: {"model": state, "epoch": 1},
    "wrapped as state_dict": lambda network, state: {"state_dict": state},
    "wrapped as model_state, as torch_em does": lambda network, state: {
        "model_state": prefixed(state, "sam."),
        "optimizer_state": {"state": {}, "param_groups": []},
    },
    "wrapped twice": lambda network, state: {"model": {"state_dict": state}},
    "from several GPUs": lambda network, state: prefixed(state, "module."),
    "compiled on several GPUs": lambda network, state: prefixed(state, "_orig_mod.module."),
    "as parameters": lambda network, state: {**state, "0.weight": nn.Parameter(state["0.weight"])},
    "with a pickled optimizer": lambda network, state: with_optimizer(network),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("saved", SAVED)
def test_everything_that_is_saved_is_read(tmp_path, network, state, saved, zipped):
    content = SAVED[saved](network, state)
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = load_network(tmp_path / "x.pth", architecture=SMALL).state_dict()
    assert read.keys() == state.keys()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(read[key], value, rtol=0, atol=0)


def test_safetensors_and_half_precision_are_read(tmp_path, state):
    save_file({key: value.half() if value.is_floating_point() else value for key, value in state.items()},
              tmp_path / "x.bin")  # fmt: skip
    read = load_network(tmp_path / "x.bin", architecture=SMALL)
    assert read[0].weight.dtype == torch.float32
    torch.testing.assert_close(read[0].weight.detach(), state["0.weight"], atol=1e-3, rtol=1e-3)


def test_what_a_gpu_wrote_is_read_without_one(tmp_path, state):
    """The place of a tensor is a string in the pickle; here it is changed to that of a GPU."""
    plain = io.BytesIO()
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "x.pth", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(entry, content)
    read = read_state(tmp_path / "x.pth")
    assert {str(value.device) for value in read.values()} == {"cpu"}
    torch.testing.assert_close(read["0.weight"], state["0.weight"])


class Code:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, state, zipped):
    marker, file = tmp_path / "marker", tmp_path / "x.pth"
    torch.save({"model": state, "extra": Code(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"holds Python objects \(posix\.system\), which are never run"):
        read_state(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file does run its command where pickles are trusted"


def test_a_class_of_another_program_is_refused(tmp_path, state):
    torch.save({"model_state": state, "init": nn.Linear(1, 1)}, tmp_path / "x.pth")
    with pytest.raises(
        InputError, match=r"Python objects \(torch\.nn\.modules\.linear\.Linear\).*state_dict"
    ):
        read_state(tmp_path / "x.pth")


def zip_of(**files):
    def write(path, _state):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name.replace("_", "/", 1), content)

    return write


def truncated(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-700])


def truncated_safetensors(path, state):
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-8])


def truncated_legacy(path, state):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-8])


def recompressed(path, state):
    torch.save(state, path.with_suffix(".stored"))
    stored = path.with_suffix(".stored")
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def script(path, _state):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), path)


WRONG = {
    "empty": (lambda path, state: path.write_bytes(b""), "is empty; get the file again"),
    "a folder": (lambda path, state: path.mkdir(), "is a folder"),
    "absent": (lambda path, state: None, "no such file"),
    "a web page": (
        lambda path, state: path.write_text("\n<!DOCTYPE html><html><body>404</body></html>"),
        "is a web page",
    ),
    "a pointer": (
        lambda path, state: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "is a Git LFS pointer",
    ),
    "text": (lambda path, state: path.write_text("hello"), "neither a PyTorch nor a safetensors file"),
    "cut off": (truncated, r"is cut off after \d+ bytes"),
    "cut off safetensors": (truncated_safetensors, "is damaged or cut off"),
    "cut off legacy": (truncated_legacy, "is damaged or cut off"),
    "an unreadable pickle": (lambda path, state: path.write_bytes(b"\x80\x02hello"), "is damaged or cut off"),
    "a ZIP of pictures": (zip_of(a_png="x"), "ZIP archive without a PyTorch checkpoint"),
    "a ZIP of nothing": (zip_of(), "ZIP archive without a PyTorch checkpoint"),
    "a script": (script, "is a TorchScript program"),
    "compressed again": (recompressed, "was compressed again"),
    "a list": (lambda path, state: torch.save([1, 2], path), "holds no parameters: an object of type list"),
    "a mapping of other things": (
        lambda path, state: torch.save({"epoch": 3, "loss": 0.1}, path),
        "holds no parameters: a mapping of epoch, loss",
    ),
    "an empty mapping": (lambda path, state: torch.save({}, path), "a mapping of nothing"),
    "too few": (
        lambda path, state: torch.save({"0.weight": state["0.weight"]}, path),
        r"not a checkpoint of a small network: lacks 6 parameters \(0\.bias, 1\.bias",
    ),
    "too many": (
        lambda path, state: torch.save({**state, "2.weight": state["0.weight"]}, path),
        r"also has 1 parameters \(2\.weight",
    ),
    "another shape": (
        lambda path, state: torch.save({**state, "0.weight": torch.zeros(2, 4)}, path),
        r"0\.weight has shape \(2, 4\), not \(2, 3\)",
    ),
    "not finite": (
        lambda path, state: torch.save({**state, "0.bias": torch.tensor([0, float("nan")])}, path),
        r"0\.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_told(tmp_path, state, case):
    write, text = WRONG[case]
    write(tmp_path / "x.pth", state)
    with pytest.raises(InputError, match=rf"^weights = '.*x\.pth': .*{text}") as told:
        load_network(tmp_path / "x.pth", architecture=SMALL)
    assert "weights_only" not in str(told.value)


def shapes_of(name):
    """Names and shapes of a network's parameters, without its memory."""
    if name in ("mobile_sam", "sam_med2d"):
        return table(name)["shapes"]
    with torch.device("meta"):
        network = SAM_NAMES[name].build()
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@pytest.mark.parametrize("name", SAM_NAMES)
def test_networks_have_the_parameters_of_their_authors(name):
    with torch.device("meta"):
        network = SAM_NAMES[name].build()
    wanted = {key: tuple(shape) for key, shape in shapes_of(name).items()}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == wanted
    assert identify(empty(wanted)) == SAM_NAMES[name].label


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param("sam2.1_tiny", "SAM 2.1 tiny"),
        pytest.param("medsam2", "SAM 2.1 tiny", marks=pytest.mark.slow),
        pytest.param("sam2.1_small", "SAM 2.1 small", marks=pytest.mark.slow),
        pytest.param("sam2.1_base_plus", "SAM 2.1 base+", marks=pytest.mark.slow),
        pytest.param("sam2.1_large", "SAM 2.1 large", marks=pytest.mark.slow),
    ],
)
def test_sam2_is_told_by_its_parameters(name, label):
    state = build_sam2(name).state_dict()
    assert identify(state) == label
    del state["no_obj_embed_spatial"]
    assert identify(state) == label.replace("2.1", "2.0")


OTHERS = {
    "SAM-HQ": {
        "image_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "mask_decoder.hf_token.weight": (1, 256),
    },
    "SAM-Med3D": {"image_encoder.patch_embed.proj.weight": (768, 1, 16, 16, 16)},
    "transformers": {"vision_encoder.layers.0.attn.qkv.weight": (2304, 768)},
    "SAM ViT-B at 256 px": {
        "image_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "image_encoder.pos_embed": (1, 16, 16, 768),
    },
    "nnU-Net": {"encoder.stages.0.0.convs.0.conv.weight": (32, 1, 3, 3, 3)},
}


@pytest.mark.parametrize("label", OTHERS)
def test_networks_of_others_are_named(label):
    assert label in identify(empty(OTHERS[label]))


def test_what_nobody_knows_is_unknown():
    assert identify(empty({"layer.weight": (1,)})) is None


@pytest.mark.parametrize(
    ("given", "wanted"), [("vit_l", "vit_b"), ("sam_med2d", "vit_b"), ("vit_b", "mobile_sam")]
)
def test_another_network_is_named_before_anything_is_built(tmp_path: Path, given, wanted):
    torch.save(empty(shapes_of(given)), tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 1_000_000
    unbuilt = Architecture(label=SAM_NAMES[wanted].label, build=lambda: pytest.fail("was built"))
    text = f"holds {SAM_NAMES[given].label}, not {SAM_NAMES[wanted].label}"
    with pytest.raises(InputError, match=text):
        load_network(tmp_path / "x.pth", architecture=unbuilt)
