"""Texts into numbers of unit length, for a model that learns what they mean for its masks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sam_infer.types import FloatArray


class TextEncoder(Protocol):
    """Embeds texts."""

    @property
    def name(self) -> str:
        """What it is called, for people."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its embeddings may."""

    @property
    def width(self) -> int:
        """Numbers of an embedding."""

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts.

        Args:
            texts: n of them.

        Returns:
            (n, width) float32, each row of length 1.
        """


class HashedTextEncoder:
    """Counts words and parts of words, hashed into a fixed width: small, offline, and without weights.

    What it can: tell texts apart, and find texts alike that share words or parts of them ("liver", "livers").
    The same text gives the same numbers on every machine. What it cannot: know what a word means; "renal
    mass" and "kidney tumour" are as strange to each other as any two texts, and word order beyond pairs of
    words is lost. A model that is trained with it learns the texts it saw, not language. The paper's encoder
    is BiomedCLIP's (`ClipTextEncoder`); this one is the project's own choice where that is not at hand.
    """

    name = "hashed"
    width = 512
    fingerprint = "hashed-words1-2-charwb3-5-512-signed-l2-v1"

    def __init__(self) -> None:
        self._vectorizer: Any = None
        self._making = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts.

        Args:
            texts: n of them, none blank.

        Returns:
            (n, 512) float32, each row of length 1.
        """
        with self._making:
            self._vectorizer = self._vectorizer or _hashing(self.width)
        return _unit(self._vectorizer.transform(_checked(texts)).toarray(), len(texts))


class ClipTextEncoder:
    """The text tower of a CLIP model.

    Args:
        clip: Has ``text(texts)`` -> (n, width) float32 and ``fingerprint``, as `sam_infer.clip`'s models do.
    """

    name = "clip"

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self._width: int | None = None

    @property
    def fingerprint(self) -> str:
        """The CLIP model's."""
        return self._clip.fingerprint

    @property
    def width(self) -> int:
        """Numbers of an embedding; the first look at it runs the model."""
        if self._width is None:
            self._width = self.encode(["text"]).shape[1]
        return self._width

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts.

        Args:
            texts: n of them, none blank.

        Returns:
            (n, width) float32, each row of length 1.
        """
        return _unit(np.asarray(self._clip.text(_checked(texts))), len(texts))


def _hashing(width: int) -> Any:
    """scikit-learn's hashing of words, pairs of words and parts of words into one signed vector."""
    from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer

    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+").build_analyzer()
    parts = CountVectorizer(analyzer="char_wb", ngram_range=(3, 5)).build_analyzer()

    def tokens(text: str) -> list[str]:
        return [f"word:{word}" for word in words(text)] + parts(text)

    return HashingVectorizer(n_features=width, analyzer=tokens, alternate_sign=True, norm="l2")


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("texts must be a sequence of texts that are not blank")
    return list(texts)


def _unit(rows: Any, count: int) -> FloatArray:
    """(count, width) float32: rows of length 1."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if rows.ndim != 2 or len(rows) != count or not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError(f"embeddings must be {count} finite rows that are not zero, got shape {rows.shape}")
    return (rows / lengths).astype(np.float32)
