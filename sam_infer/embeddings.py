"""An engine behind its caches: slices and crops encoded once, clicks decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from sam_infer.cache import ByteLru
from sam_infer.embeddingstore import EmbeddingStore, Packed, content_key, pack
from sam_infer.engines.base import Embedding, Engine
from sam_infer.geometry import slice_image
from sam_infer.history import ClickHistories
from sam_infer.intensity import Window
from sam_infer.types import Candidates, Crop, FloatArray, Prompts
from sam_infer.volumes import Image
from sam_infer.zoom import choose_crop, crop_prompts, holds, leaves, paste


class _EncoderReplacedError(Exception):
    """The encoder became another one while it encoded."""


class SliceEncoder:
    """An engine behind caches of embeddings, in memory and on disk, and of decoded click histories.

    In memory, keys hold the file's identity, the window, the slice or crop and the encoder's fingerprint; on
    disk, the pixels that the encoder sees and its fingerprint (`sam_infer.embeddingstore.content_key`). So a
    changed file, window or model never meets a stale entry, and a new decoder leaves embeddings as they are.
    Nothing is kept per user.

    ``zoom`` in the methods: True = encode a crop around what the prompts say (`sam_infer.zoom`), False = the
    whole slice, None = a crop where there is a box, and for clicks and masks too where the engine encodes
    fast. An engine that looks at a slice's own pixels needs no zoom, and then none is made.

    Args:
        engine: The engine.
        store: Embeddings on disk, of images that are stored themselves; None keeps them in memory only.
        embedding_bytes: Limit of the embeddings in memory.
        history_bytes: Limit of the decoded histories in memory.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: EmbeddingStore | None = None,
        embedding_bytes: int = 512 << 20,
        history_bytes: int = 128 << 20,
    ) -> None:
        self.engine = engine
        self.store = store
        self._embeddings: ByteLru[Packed] = ByteLru(limit=embedding_bytes, size_of=lambda e: e.nbytes)
        self._histories = ClickHistories(limit=history_bytes)

    def slice_values(self, image: Image, k: int, window: Window, *, crop: Crop | None = None) -> FloatArray:
        """Slice ``k`` or its crop windowed to 0..1, (H, W) or (H, W, 3) float32."""
        pixels = slice_image(image.array, k)
        if crop is not None:
            pixels = pixels[crop[1] : crop[3] + 1, crop[0] : crop[2] + 1]
        return window.apply(pixels)

    def _encoded_by(self) -> str:
        encoding = self.engine.encoding
        own = encoding.fingerprint if encoding is not None else None
        return own or self.engine.fingerprint

    @property
    def room(self) -> int:
        """Bytes of embeddings that can be kept."""
        disk = 0 if self.store is None or self.store.failing else self.store.limit
        return max(self._embeddings.limit, disk)

    def embedding(
        self, image: Image, k: int, window: Window, *, crop: Crop | None = None
    ) -> tuple[Embedding, bool]:
        """The embedding of slice ``k`` or of its crop, and whether nothing had to be encoded for it."""
        packed, known = self.packed(image, k, window, crop=crop)
        return packed.unpacked(), known

    def packed(
        self, image: Image, k: int, window: Window, *, crop: Crop | None = None
    ) -> tuple[Packed, bool]:
        """`embedding` as it is kept."""
        while True:
            with suppress(_EncoderReplacedError):
                return self._packed(image, k, window, crop, self._encoded_by())

    def _packed(
        self, image: Image, k: int, window: Window, crop: Crop | None, made_by: str
    ) -> tuple[Packed, bool]:
        encoded = False

        def make() -> Packed:
            nonlocal encoded
            values = self.slice_values(image, k, window, crop=crop)
            encoding = self.engine.encoding
            store = self.store if encoding is not None and not image.transient else None
            key = content_key(values, made_by) if store is not None else ""
            packed = store.get(key) if store is not None else None
            if packed is None:
                encoded = True
                packed = pack(self.engine.encode(values), narrow=encoding is not None)
                if self._encoded_by() != made_by:
                    raise _EncoderReplacedError
                if store is not None:
                    store.put(key, packed)
            return packed if encoding is None else packed.on(encoding.device)

        packed, _ = self._embeddings.get_or_make((image.key, k, window, made_by, crop), make)
        return packed, not encoded

    def prepare(
        self, image: Image, k: int, window: Window, prompts: Prompts, *, zoom: bool | None = None
    ) -> bool:
        """Encode what `decode_history` will look at first; whether nothing had to be encoded."""
        if self._histories.knows(self._base(image, k, window, prompts, zoom), prompts):
            return True
        return self.embedding(image, k, window, crop=self._crop(image, prompts, zoom=zoom))[1]

    def decode(
        self,
        image: Image,
        k: int,
        window: Window,
        prompts: Sequence[Prompts],
        *,
        zoom: bool | None = False,
    ) -> list[Candidates]:
        """Decode prompts on one slice as they are, in one call of the engine and from one crop."""
        return self._decode(image, k, window, prompts, self._crop(image, *prompts, zoom=zoom))

    def decode_history(
        self, image: Image, k: int, window: Window, prompts: Prompts, *, zoom: bool | None = None
    ) -> Candidates:
        """Decode clicks as corrections of one another: each sees the logits that the one before it gave.

        See `sam_infer.history.ClickHistories.answer`. A history keeps its crop until a foreground click lies
        beyond it. Clicks alone do not tell an object's size: where they are zoomed, the mask that they give
        on the whole slice does.

        Args:
            image: The image.
            k: Slice index.
            window: The window.
            prompts: All clicks so far, the box, and in ``mask_logits`` the mask that is being corrected.
            zoom: See the class.
        """
        zoomed = self._zooms(zoom, prompts)

        def decode(prompts: Prompts, before: Candidates | None) -> Candidates:
            if before is not None and (before.crop is None or holds(before.crop, prompts.positive)):
                crop = before.crop
            else:
                crop = self._crop(image, prompts, zoom=zoomed)
            found = self._decode(image, k, window, [prompts], crop)[0]
            if before is not None or prompts.box is not None or prompts.mask_logits is not None:
                return found
            shown = replace(prompts, mask_logits=found.logits[found.best])
            crop = self._crop(image, shown, zoom=zoomed)
            if crop is None:
                return found
            closer = self._decode(image, k, window, [shown], crop)[0]
            return found if closer.crop is None else closer

        return self._histories.answer(self._base(image, k, window, prompts, zoom), prompts, decode)

    def _base(
        self, image: Image, k: int, window: Window, prompts: Prompts, zoom: bool | None
    ) -> tuple[Hashable, ...]:
        """What a history lies on."""
        mask = prompts.mask_logits
        sent = None if mask is None else hashlib.sha256(np.ascontiguousarray(mask).data).hexdigest()
        return (image.key, k, window, self.engine.fingerprint, self._zooms(zoom, prompts), sent)

    def _zooms(self, zoom: bool | None, *prompts: Prompts) -> bool:
        encoding = self.engine.encoding
        if encoding is None or zoom is False:
            return False
        return bool(zoom) or encoding.cheap or any(prompt.box is not None for prompt in prompts)

    def _crop(self, image: Image, *prompts: Prompts, zoom: bool | None) -> Crop | None:
        encoding = self.engine.encoding
        if encoding is None or not self._zooms(zoom, *prompts):
            return None
        return choose_crop(prompts, (image.shape[1], image.shape[0]), encoding)

    def _decode(
        self, image: Image, k: int, window: Window, prompts: Sequence[Prompts], crop: Crop | None
    ) -> list[Candidates]:
        """Decode from a crop; from the whole slice where there is none, or an object does not end in it."""
        if crop is not None:
            embedding = self.embedding(image, k, window, crop=crop)[0]
            inside = self.engine.decode(embedding, [crop_prompts(prompt, crop) for prompt in prompts])
            found = [paste(one, crop, (image.shape[1], image.shape[0])) for one in inside]
            if not any(leaves(one.mask(), crop) for one in found):
                return found
        return self.engine.decode(self.embedding(image, k, window)[0], prompts)
