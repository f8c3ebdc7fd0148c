"""A CLIP model from a folder: texts and slices into one space. Nothing is ever fetched here.

The folder is one as open_clip publishes it: ``open_clip_config.json``, the weights, and the files of the
tokenizer where the text tower is of transformers. BiomedCLIP's configuration names another repository for
its text tower, whose ``config.json`` open_clip would fetch. The tower's own weights tell all of it that
matters but the number of heads, and those of every BERT have 64 features. A ``config.json`` in the folder
goes before that.

A slice is squeezed into the model's square, as the authors of MedCLIP-SAM do, and not cropped: a map of
saliency must cover all of it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_infer.cache import ByteLru
from sam_infer.clip.towers import Tower, tower_of
from sam_infer.errors import InputError
from sam_infer.types import FloatArray

CONFIG = "open_clip_config.json"
#: Names of the weights file, in the order in which open_clip looks for them.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
#: Features of an attention head in every BERT.
_HEAD = 64
_BERT = "text.transformer."


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network in memory, for whoever holds the model's lock.

    Args:
        network: open_clip's, in evaluation mode, without gradients to its parameters.
        tokenizer: Texts to (n, T) int64 tokens.
        tower: The parts of its image tower.
        side: Rows and columns of what the image tower sees, in pixels.
        mean: (3, 1, 1), what is taken from each channel.
        std: (3, 1, 1), what each channel is then divided by.
    """

    network: nn.Module
    tokenizer: Any
    tower: Tower
    side: tuple[int, int]
    mean: Tensor
    std: Tensor

    def inputs(self, pixels: FloatArray) -> Tensor:
        """A slice, (H, W) or (H, W, 3) float32 in 0..1, as (1, 3, S, S), normalised."""
        colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)
        image = torch.from_numpy(np.ascontiguousarray(colour.transpose(2, 0, 1)))[None].to(self.mean.device)
        image = F.interpolate(image, self.side, mode="bicubic", antialias=True, align_corners=False)
        return (image.clamp(0, 1) - self.mean) / self.std

    def embed(self, images: Tensor) -> Tensor:
        """(B, D) of unit length, of (B, 3, S, S) as from `inputs`."""
        found: Tensor = self.network.encode_image(images, normalize=True)  # type: ignore[operator]
        return found

    def logits(self, images: Tensor, text: Tensor) -> Tensor:
        """(B,): how well images fit a text (D,), as the model was trained to say it: scaled cosines."""
        scale: Tensor = self.network.logit_scale.exp().reshape(())  # type: ignore[operator, union-attr]
        return scale * (self.embed(images) @ text)


class ClipModel:
    """A CLIP model, loaded on first use. Safe to call from several threads.

    Args:
        folder: Where its files are.
        device: Torch device.
    """

    def __init__(self, folder: Path | str, *, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self._device = device
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None
        self._fingerprint = ""
        self._texts: ByteLru[FloatArray] = ByteLru(limit=1 << 20, size_of=lambda one: one.nbytes)

    @property
    def weights(self) -> Path:
        """The weights file.

        Raises:
            InputError: (409) When the folder has none.
        """
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return self.folder / name
        raise self._useless(f"holds none of {', '.join(WEIGHTS)}")

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the weights file's sha256; read once.

        Raises:
            InputError: (409) When there is no weights file.
        """
        with self._lock:
            if not self._fingerprint:
                with self.weights.open("rb") as file:
                    self._fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            return self._fingerprint

    def text(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts.

        Args:
            texts: What is beyond the model's context is cut off.

        Returns:
            (n, D) float32 of unit length.

        Raises:
            InputError: (409) When the folder does not hold a model that can be used.
        """

        def make(text: str) -> FloatArray:
            with self.opened() as loaded, torch.no_grad():
                tokens = loaded.tokenizer([text]).to(loaded.mean.device)
                found = loaded.network.encode_text(tokens, normalize=True)  # type: ignore[operator]
                embedded: FloatArray = found[0].float().cpu().numpy()
                return embedded

        return np.stack([self._texts.get_or_make(text, partial(make, text))[0] for text in texts])

    def image(self, pixels: FloatArray) -> FloatArray:
        """Embed a slice.

        Args:
            pixels: (H, W) or (H, W, 3) float32, 0..1.

        Returns:
            (D,) float32 of unit length.

        Raises:
            InputError: (409) When the folder does not hold a model that can be used.
        """
        with self.opened() as loaded, torch.no_grad():
            found: FloatArray = loaded.embed(loaded.inputs(pixels))[0].float().cpu().numpy()
        return found

    @contextmanager
    def opened(self) -> Iterator[Loaded]:
        """The network, for one thread at a time, loaded where it is not yet.

        Gradients can be taken within, also inside a server that turns them off.

        Raises:
            InputError: (409) When the folder does not hold a model that can be used.
        """
        with self._lock, torch.inference_mode(False), torch.enable_grad():
            if self._loaded is None:
                self._loaded = self._load()
            yield self._loaded

    def _load(self) -> Loaded:
        weights = self.weights
        try:
            return _load(self.folder, weights, self._device)
        except Exception as error:  # the readers of foreign files raise what they like
            raise self._useless(
                f"does not hold a CLIP model that can be used: {_first_line(error)}"
            ) from error

    def _useless(self, reason: str) -> InputError:
        return InputError(
            "clip",
            str(self.folder),
            f"{reason}; name a folder as open_clip publishes it, or fetch one with "
            "`samloop weights fetch biomed_clip`",
            status=409,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _load(folder: Path, weights: Path, device: str) -> Loaded:
    import open_clip

    config = json.loads((folder / CONFIG).read_text("utf-8"))["model_cfg"]
    text = dict(config["text_cfg"])
    with tempfile.TemporaryDirectory() as scratch:
        if text.get("hf_model_name"):
            text |= {"hf_model_name": str(_tower_config(folder, weights, Path(scratch)))}
            text |= {"hf_model_pretrained": False}
        network = open_clip.create_model(
            f"local-dir:{folder}", device=device, require_pretrained=True, weights_only=True, text_cfg=text
        )
    local = {"local_files_only": True} if text.get("hf_tokenizer_name") else {}
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", **local)
    network = network.float().eval().requires_grad_(False)
    seen = network.visual.preprocess_cfg
    side = seen["size"] if isinstance(seen["size"], tuple | list) else (seen["size"], seen["size"])
    return Loaded(
        network=network,
        tokenizer=tokenizer,
        tower=tower_of(network.visual),
        side=(int(side[0]), int(side[1])),
        mean=torch.tensor(seen["mean"], device=device).reshape(3, 1, 1),
        std=torch.tensor(seen["std"], device=device).reshape(3, 1, 1),
    )


def _tower_config(folder: Path, weights: Path, scratch: Path) -> Path:
    """A folder with the ``config.json`` of the text tower: the model's own, or one made here."""
    if (folder / "config.json").is_file():
        return folder
    from open_clip.factory import load_state_dict
    from transformers import BertConfig

    BertConfig(**_bert(load_state_dict(str(weights)))).save_pretrained(scratch)
    return scratch


def _bert(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a BERT, read off its weights.

    Raises:
        ValueError: When the text tower is no BERT with heads of `_HEAD` features.
    """
    embeddings = f"{_BERT}embeddings."
    try:
        vocabulary, width = state[f"{embeddings}word_embeddings.weight"].shape
        positions = len(state[f"{embeddings}position_embeddings.weight"])
        kinds = len(state[f"{embeddings}token_type_embeddings.weight"])
        inner = len(state[f"{_BERT}encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise ValueError(
            f"its text tower is no BERT ({error} is missing); put the tower's config.json into the folder"
        ) from error
    if width % _HEAD:
        raise ValueError(f"its text tower is {width} wide; put the tower's config.json into the folder")
    layers = {key.split(".")[4] for key in state if key.startswith(f"{_BERT}encoder.layer.")}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // _HEAD,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": kinds,
    }
