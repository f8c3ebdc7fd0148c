"""What is said about a label: an answer about the image at hand, then a description of its kind.

After Konwer et al. (arXiv 2503.04639), who put the answer to a question about the image and a generic
sentence about the class into one text and embed it. That the answer comes first, with a space between, is a
re-implementation's; that a project's own sentence goes before any other, and that several questions may be
asked, is this project's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sam_infer.cache import ByteLru
from sam_infer.errors import InputError
from sam_infer.text.answers import QUESTIONS, Answerer, LocalAnswerer
from sam_infer.text.descriptions import describe, spoken
from sam_infer.text.encoders import TextEncoder
from sam_infer.text.endpoint import EndpointDescriptions, EndpointSettings
from sam_infer.types import FloatArray

Source = Literal["shipped", "endpoint"]
#: The file of an endpoint's answers, in the folder that `LabelTexts` is given.
KEPT = "descriptions.json"
_ANSWER_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where texts come from.

    Args:
        descriptions: The project's own sentence about a label, by the label's name; it goes before any other.
        source: Where the sentences about the other labels come from: "shipped" with the package, or
            "endpoint".
        endpoint: The endpoint; needed for that source, and asked for no other.
        answers: Folder of a visual question answering model; None = nothing is said about single images.
        questions: What it is asked: names of `QUESTIONS`, or questions with {label} for the label's name.

    Raises:
        InputError: When a value cannot be used.
    """

    descriptions: Mapping[str, str] = field(default_factory=dict)
    source: Source = "shipped"
    endpoint: EndpointSettings | None = None
    answers: Path | None = None
    questions: tuple[str, ...] = ("shape_and_place",)

    def __post_init__(self) -> None:
        if not isinstance(self.descriptions, Mapping):
            raise InputError("descriptions", self.descriptions, "give a mapping of labels to sentences")
        for label, text in self.descriptions.items():
            if not isinstance(label, str) or not isinstance(text, str) or not text.strip():
                raise InputError(f"descriptions.{label}", text, "give a sentence about the label")
        if self.source not in get_args(Source):
            raise InputError("source", self.source, f"choose one of {', '.join(get_args(Source))}")
        if self.source == "endpoint" and self.endpoint is None:
            raise InputError("source", self.source, "name the endpoint too: its url and its model")
        if not isinstance(self.questions, list | tuple) or not self.questions:
            raise InputError("questions", self.questions, "give a list of questions, one or more")
        for question in self.questions:
            if not isinstance(question, str) or "{label}" not in QUESTIONS.get(question, question):
                known = ", ".join(QUESTIONS)
                raise InputError(
                    "questions", question, f"give a question with {{label}} in it, or one of {known}"
                )


class LabelTexts:
    """Texts about labels, and their embeddings. Safe to call from several threads.

    Args:
        settings: Where the texts come from.
        encoder: Embeds them.
        folder: Where an endpoint's answers are kept.
        device: Where the answering model runs, as torch names it.
        answerer: Answers about images; None = as the settings say.
    """

    def __init__(
        self,
        settings: TextSettings,
        *,
        encoder: TextEncoder,
        folder: Path,
        device: str = "cpu",
        answerer: Answerer | None = None,
    ) -> None:
        self.encoder = encoder
        self.answerer = answerer
        if answerer is None and settings.answers is not None:
            self.answerer = LocalAnswerer(settings.answers, device=device)
        self._settings = settings
        self._questions = [QUESTIONS.get(one, one) for one in settings.questions]
        self._endpoint: EndpointDescriptions | None = None
        if settings.source == "endpoint" and settings.endpoint is not None:
            self._endpoint = EndpointDescriptions(settings.endpoint, cache=folder / KEPT)
        self._answers: ByteLru[str] = ByteLru(limit=_ANSWER_BYTES, size_of=lambda text: 256 + len(text))
        self._descriptions: dict[str, str] = {}
        self._embeddings: dict[str, FloatArray] = {}

    def description(self, label: str) -> str:
        """The sentence about a label's kind: the project's own, else the source's.

        Args:
            label: The label's name.

        Raises:
            InputError: When there is none.
        """
        if label in self._descriptions:
            return self._descriptions[label]
        text = self._settings.descriptions.get(label)
        if text is None:
            text = self._endpoint.describe(label) if self._endpoint is not None else describe(label)
        if text is None:
            raise InputError(
                "label",
                label,
                "nothing is known about it in words; write a sentence on how it looks under `descriptions:` "
                "in the project file",
            )
        return self._descriptions.setdefault(label, " ".join(text.split()))

    def text(self, label: str, image: FloatArray | None = None) -> str:
        """What is said about a label: the answers about the image, then the description.

        Args:
            label: The label's name.
            image: (H, W) or (H, W, 3) float32, 0..1; None = the description alone. It is looked at only where
                there is an answerer.

        Raises:
            InputError: When there is no description, or the answering model cannot be used.
        """
        parts = [self.description(label)]
        if self.answerer is not None and image is not None:
            parts = [*self._answered(self.answerer, label, image), *parts]
        return " ".join(part for part in parts if part)

    def embedding(self, label: str, image: FloatArray | None = None) -> FloatArray:
        """The embedding of a label's text.

        Args:
            label: The label's name.
            image: As in `text`.

        Returns:
            (width,) float32 of length 1, read-only; the same array each time where no image is looked at.

        Raises:
            InputError: As `text` does.
        """
        if self.answerer is not None and image is not None:
            return self.encoder.encode([self.text(label, image)])[0]
        if label not in self._embeddings:
            made = self.encoder.encode([self.text(label)])[0]
            made.flags.writeable = False
            return self._embeddings.setdefault(label, made)
        return self._embeddings[label]

    def record(self, labels: Iterable[str]) -> dict[str, Any]:
        """What the embeddings of labels depend on, for the record of a model that learned from them.

        Args:
            labels: Names of labels.
        """
        return {
            "encoder": self.encoder.fingerprint,
            "answerer": self.answerer.fingerprint if self.answerer is not None else None,
            "questions": self._questions if self.answerer is not None else [],
            "descriptions": {label: self.description(label) for label in labels},
        }

    def _answered(self, answerer: Answerer, label: str, image: FloatArray) -> list[str]:
        """An answer to each question; the model is asked once about the same pixels."""
        pixels = np.ascontiguousarray(image)
        seen = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode() + pixels.tobytes()).hexdigest()
        questions = [one.replace("{label}", spoken(label)) for one in self._questions]
        return [
            self._answers.get_or_make((seen, asked), partial(answerer.answer, image, asked))[0]
            for asked in questions
        ]
