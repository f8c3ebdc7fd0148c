"""Answers about one image: a visual question answering model on this machine.

Konwer et al. (arXiv 2503.04639) ask MedVInT about the shape and the location of the organ or tumour in each
image. Here any such model can answer that lies in a local folder as the library transformers saves it. There
is no remote one: an image never leaves the machine.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sam_infer.errors import InputError
from sam_infer.types import FloatArray

#: Questions by name. "shape" is known from readers of the paper, for the liver; "shape_and_place" is what a
#: re-implementation asks; "place" is this project's own wording.
QUESTIONS = {
    "shape": "What is the shape of the {label}?",
    "shape_and_place": "What is the shape of {label} and where is it located?",
    "place": "In which part of the image does {label} lie?",
}
#: Tokens of an answer at most; this project's own choice.
MAX_TOKENS = 48
#: What decides a model's answers beside its files, with a version.
_KIND = "answers/v1"
_FILES = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja")


class Answerer(Protocol):
    """Answers questions about an image."""

    @property
    def name(self) -> str:
        """What it is called, for people."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its answers may."""

    def answer(self, image: FloatArray, question: str) -> str:
        """Answer one question.

        Args:
            image: (H, W) or (H, W, 3) float32, 0..1.
            question: In plain words.
        """


class LocalAnswerer:
    """A visual question answering model from a local folder. Safe to call from several threads.

    BLIP for question answering is read, and every image-text model with a chat template that transformers
    knows. The most likely word is taken each time, so an answer is the same whenever it is asked for. Nothing
    is fetched, no code from the folder is run, and pickled weights are read as tensors only.

    Args:
        folder: What ``save_pretrained`` of the model and of its processor wrote.
        device: Where it runs, as torch names it.
        max_tokens: Tokens of an answer at most.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", max_tokens: int = MAX_TOKENS) -> None:
        self._folder = folder
        self._device = device
        self._max_tokens = max_tokens
        self._loaded: tuple[Any, Any, bool] | None = None
        self._fingerprint: str | None = None
        self._loading = threading.Lock()
        self._answering = threading.Lock()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._folder.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the files in the folder and of the length of an answer.

        Raises:
            InputError: Status 409, where the folder holds no model.
        """
        with self._loading:
            return self._identified()

    def answer(self, image: FloatArray, question: str) -> str:
        """Answer one question about an image.

        Args:
            image: (H, W) or (H, W, 3) float32, 0..1.
            question: In plain words.

        Returns:
            The answer on one line; "" where the model has nothing to say.

        Raises:
            InputError: Status 409 where the folder holds no model, 422 where it cannot be used.
        """
        import torch

        picture = _picture(image)
        with self._loading:
            model, processor, chats = self._loaded = self._loaded or self._load()
        with self._answering, torch.inference_mode():
            asked = _chat(processor, picture, question) if chats else _plain(processor, picture, question)
            inputs = asked.to(model.device, dtype=model.dtype)
            tokens = model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False, num_beams=1)[
                0
            ]
        said = tokens[inputs["input_ids"].shape[1] :] if chats else tokens
        return " ".join(processor.decode(said, skip_special_tokens=True).split())

    def _identified(self) -> str:
        """The fingerprint; whoever asks holds the lock of loading."""
        if self._fingerprint is None:
            _config(self._folder)
            digest = hashlib.sha256(f"{_KIND} {self._max_tokens}".encode())
            for path in sorted({path for pattern in _FILES for path in self._folder.glob(pattern)}):
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _load(self) -> tuple[Any, Any, bool]:
        """The model, its processor, and whether it takes a question as a turn of a chat."""
        from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering

        config = _config(self._folder)
        blip = "BlipForQuestionAnswering" in (config.get("architectures") or ())
        kind: Any = BlipForQuestionAnswering if blip else AutoModelForImageTextToText
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            processor = AutoProcessor.from_pretrained(self._folder, **local)
            model, found = kind.from_pretrained(self._folder, output_loading_info=True, **local)
        except Exception as error:  # the readers of foreign files raise what they like
            raise _unusable(self._folder, f"transformers cannot read it: {error}") from error
        if found["missing_keys"]:
            some = ", ".join(sorted(found["missing_keys"])[:3])
            raise _unusable(
                self._folder, f"its weights lack parameters of {type(model).__name__} ({some} ...)"
            )
        if not blip and not getattr(processor, "chat_template", None):
            raise _unusable(self._folder, f"{type(model).__name__} comes without a chat template")
        self._identified()  # now: the files may be replaced later
        return model.to(self._device).eval(), processor, not blip


def _config(folder: Path) -> dict[str, Any]:
    """What the folder says it holds."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            "answers",
            str(folder),
            "there is no model here (no config.json); put the folder of a visual question answering model "
            "there, or leave `answers` out",
            status=409,
        ) from None
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"its config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _unusable(folder, "its config.json is not an object")
    return config


def _unusable(folder: Path, reason: str) -> InputError:
    return InputError(
        "answers",
        str(folder),
        f"{reason}; name a folder with BLIP for question answering, or with an image-text model that has a "
        "chat template, and their processor",
        status=422,
    )


def _picture(image: FloatArray) -> Any:
    """(H, W) or (H, W, 3) float32 0..1 as an RGB picture of 8 bits."""
    from PIL import Image

    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image must have shape (H, W) or (H, W, 3), got {image.shape}")
    return Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _plain(processor: Any, picture: Any, question: str) -> Any:
    """The image and the question alone."""
    return processor(images=picture, text=question, return_tensors="pt")


def _chat(processor: Any, picture: Any, question: str) -> Any:
    """The question as a turn of a chat, with the image before it."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
