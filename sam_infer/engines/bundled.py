"""The engine of the bundled weights: crops around the prompts, resampled to the network's input.

There is nothing to encode beforehand: an embedding holds the grey image and its reductions. A box (or a
previous mask) says where to look, so one crop answers it; clicks alone do not, so they are tried in
windows of the whole, half and quarter image, each of these answers is looked at again in a window of its own
size, and they are ranked. A box without a mask, and clicks that an answer disobeys, are answered a second
time with the first answer as the previous mask.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from sam_infer.engines.base import Embedding
from sam_infer.engines.bundledcrops import (
    closer_prompt,
    draw_crops,
    prompt_windows,
    wants_second_look,
    with_previous,
)
from sam_infer.engines.bundledrank import (
    STEADINESS,
    Answer,
    Calibration,
    agreement,
    iou_of,
    quality,
    ranked,
)
from sam_infer.networks import promptchannels
from sam_infer.networks.cropwindow import Window, paste, pyramid
from sam_infer.networks.promptchannels import CropBatch, prompt_channels
from sam_infer.networks.promptnet import PromptNet
from sam_infer.types import Candidates, FloatArray, Prompts

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "bundled.safetensors"
OUTSIDE = -16.0
FORMAT = "samloop-promptnet-2"
_CROPS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    network: PromptNet
    calibration: Calibration


class BundledEngine:
    """Masks from the weights that come with the package.

    Args:
        weights: A .safetensors file written by ``python -m trainers.pretrain``; the shipped one by
            default.
        device: Torch device of the network and the embeddings.
        name: The registry's name of the engine.
    """

    def __init__(self, *, weights: Path | None = None, device: str = "cpu", name: str = "bundled") -> None:
        self._weights = WEIGHTS if weights is None else Path(weights)
        self._device = device
        self._name = name
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None
        self._digest: str | None = None

    @property
    def name(self) -> str:
        """The registry's name of the engine."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weight file and the version of the preprocessing."""
        with self._lock:
            if self._digest is None:
                self._digest = hashlib.sha256(_existing(self._weights).read_bytes()).hexdigest()
            return f"{self._digest}-crop{promptchannels.VERSION}"

    @property
    def encoding(self) -> None:
        """None: crops are taken from the slice's own pixels when prompts are decoded."""
        return None

    def encode(self, image: FloatArray) -> Embedding:
        """Keep the grey image and its 2, 4 and 8 times reduced means.

        Args:
            image: (H, W) or (H, W, 3) float32 in 0..1; colour becomes its mean.
        """
        grey = np.asarray(image, np.float32)
        if grey.ndim == 3 and grey.shape[2] == 3:
            grey = grey.mean(2)
        if grey.ndim != 2 or 0 in grey.shape:
            raise ValueError(f"image must have shape (H, W) or (H, W, 3), got {np.shape(image)}")
        levels = pyramid(torch.from_numpy(np.ascontiguousarray(grey)).to(self._device))
        height, width = grey.shape
        return Embedding(
            image_size=(height, width), features={f"level{n}": level for n, level in enumerate(levels)}
        )

    @torch.inference_mode()
    def decode(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidates]:
        """Decode every prompt; the crops of all of them go through the network together.

        Args:
            embedding: From `encode` of this engine.
            prompts: One entry per object, none of them empty.

        Returns:
            One `Candidates` per prompt: one mask for a box or a previous mask alone, up to three for
            clicks. ``iou`` is calibrated and cut down for every click that a mask disobeys, so its order
            is the ranking. Beyond a candidate's crop the logits are `OUTSIDE`.
        """
        calibration = self._load().calibration
        return [
            ranked(answer.logits, calibration.iou(answer), prompt)
            for answer, prompt in zip(self.answers(embedding, prompts), prompts, strict=True)
        ]

    @torch.inference_mode()
    def answers(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Answer]:
        """What every window answers, neither calibrated nor ranked; arguments as for `decode`."""
        size = embedding.image_size
        for prompt in prompts:
            if prompt.is_empty:
                raise ValueError("prompts must not be empty: give a box, a foreground click or a mask")
            if prompt.mask_logits is not None and prompt.mask_logits.shape != size:
                raise ValueError(f"mask_logits must have shape {size}, got {prompt.mask_logits.shape}")
        windows = [prompt_windows(prompt, size) for prompt in prompts]
        owners = [n for n, some in enumerate(windows) for _ in some]
        if not owners:
            return []
        asked = [prompts[n] for n in owners]
        logits, features = self._look(embedding, [window for some in windows for window in some], asked)
        closer = {n: closer_prompt(asked[n], logits[n]) for n in range(len(asked)) if _clicks_alone(asked[n])}
        again = [(n, prompt) for n, prompt in closer.items() if prompt is not None]
        if again:
            nearer = [prompt_windows(prompt, size)[0] for _, prompt in again]
            better, signs = self._look(embedding, nearer, [prompt for _, prompt in again])
            for (n, _), answer, sign in zip(again, better, signs, strict=True):
                sign[STEADINESS] = iou_of(logits[n] > 0, answer > 0)
                logits[n], features[n] = answer, sign
        found = []
        for number in range(len(prompts)):
            mine = [n for n, owner in enumerate(owners) if owner == number]
            columns = np.column_stack([features[mine], agreement(logits[mine] > 0)])
            kind = "clicks" if _clicks_alone(prompts[number]) else "one" if len(mine) == 1 else "corrected"
            found.append(Answer(logits=logits[mine], features=columns, kind=kind))
        return found

    def _look(
        self, embedding: Embedding, windows: list[Window], prompts: list[Prompts]
    ) -> tuple[FloatArray, NDArray[np.float64]]:
        """Each prompt answered in its window: logits (N, H, W) and features (N, 5) without the agreement."""
        crops = draw_crops(embedding, windows, prompts)
        first, iou = self._run(crops)
        logits, again = first.clone(), torch.nonzero(wants_second_look(crops, first))[:, 0]
        if len(again):
            logits[again], iou[again] = self._run(with_previous(crops.select(again), first[again]))
        signs = torch.stack([iou, *quality(first, logits, crops.valid)], 1)
        pasted = [paste(logits[n], windows[n], embedding.image_size, OUTSIDE) for n in range(len(windows))]
        return torch.stack(pasted).cpu().numpy(), signs.cpu().numpy().astype(np.float64)

    def _run(self, crops: CropBatch) -> tuple[Tensor, Tensor]:
        loaded = self._load()
        parts = []
        for start in range(0, len(crops.image), _CROPS_AT_ONCE):
            index = torch.arange(start, min(start + _CROPS_AT_ONCE, len(crops.image)), device=self._device)
            inputs = prompt_channels(crops.select(index)).contiguous(memory_format=torch.channels_last)
            parts.append(loaded.network(inputs))
        logits, iou = (torch.cat([part[n] for part in parts]) for n in (0, 1))
        return logits, iou

    def _load(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                with safe_open(_existing(self._weights), "pt") as file:
                    header = file.metadata() or {}
                    tensors = {key: file.get_tensor(key).float() for key in sorted(file.keys())}
                if header.get("format") != FORMAT:
                    raise ValueError(
                        f"weights = {self._weights.name}: not a {FORMAT} file; make one with "
                        "`python -m trainers.pretrain`"
                    )
                network = PromptNet.holding(tensors)
                lines = json.loads(header.get("iou_calibration", "{}"))
                calibration = Calibration(**{name: tuple(line) for name, line in lines.items()})
                network = network.to(self._device).eval().requires_grad_(False)
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster
                self._loaded = _Loaded(network=network, calibration=calibration)
            return self._loaded


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"weights = {path}: no such file; give an existing one or make it with "
            "`python -m trainers.pretrain`"
        )
    return path


def _clicks_alone(prompt: Prompts) -> bool:
    return prompt.box is None and prompt.mask_logits is None
