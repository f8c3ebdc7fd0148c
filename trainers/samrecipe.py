"""What the trainers of a tuned SAM share: its base, what learns, what is published, and how it is judged."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine
from sam_infer.errors import InputError
from sam_infer.tuning.methods import METHODS, Tuning
from sam_infer.tuning.tunedfile import TunedSam, load_tuned, save_tuned, untuned
from sam_infer.volumes import read_labelmap
from trainers.basis import Basis
from trainers.data import Case
from trainers.modelrecipe import Model, ModelRecipe
from trainers.options import choice, number
from trainers.round import Plan, Round
from trainers.samviews import CROPS, SLICES_PER_LABEL, Frame, View, frame_of, object_views

#: Embeddings in memory while a model is judged, bytes.
_JUDGED = 256 << 20
#: What is learned from in memory, bytes: beyond, fewer slices of each case are.
VIEW_BYTES = 1 << 30


class SamBased(ModelRecipe[Model]):
    """A trainer whose result stands on a SAM that answers clicks.

    Args:
        basis: What it stands on.
        base: The SAM that is tuned; it is never changed.
        store: Embeddings of the base on disk; None = they are made again each time.
        name: Of the trainer.
        served: Name of the file that it publishes.
        description: For people.
    """

    #: What can be made to learn, by the name that a request gives; the first is the default.
    methods: Mapping[str, Tuning] = METHODS

    def __init__(
        self,
        basis: Basis,
        *,
        base: SamEngine,
        store: EmbeddingStore | None,
        name: str,
        served: str,
        description: str,
    ) -> None:
        super().__init__(basis, name=name, served=served, description=description, warm=True)
        self.base = base
        self.store = store

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {
            **super().config(),
            "iterations": 300,
            "learning_rate": 0.0005,
            "method": list(self.methods),
            "rank": 8,
        }

    def slices_each(self, cases: int, *, views: int = 1) -> int:
        """On how many slices of a case each label is learned from, so that all fit into `VIEW_BYTES`.

        Args:
            cases: Their number.
            views: Kept of each object.
        """
        frame, width = self.frame, int(self.base.model.prompt_encoder.embed_dim)
        each = 2 * width * frame.grid**2 + frame.low**2  # an embedding in half precision, and its truth
        room = VIEW_BYTES // (each * views * max(1, cases) * len(self.basis.labels))
        return min(SLICES_PER_LABEL, max(1, room))

    def _options(self, request: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config()
        return {
            "base": self.base.digest,
            "method": choice(request, "method", config["method"]),
            "rank": int(number(request, "rank", config["rank"], low=1, high=256, whole=True)),
        }

    def tuning(self, plan: Plan) -> Tuning:
        """What learns."""
        chosen = self.methods[plan.options["method"]]
        low = "lora" in (chosen.encoder, chosen.decoder)
        return replace(chosen, rank=plan.options["rank"]) if low else chosen

    @property
    def frame(self) -> Frame:
        """What the base makes of a slice."""
        return frame_of(self.base)

    def encoder(self, engine: SamEngine) -> SliceEncoder:
        """An engine behind caches of its own; on disk are those of the base's encoder alone."""
        alike = engine is self.base or engine.encoding.fingerprint == self.base.fingerprint
        store = self.store if alike else None
        return SliceEncoder(engine=engine, store=store, embedding_bytes=_JUDGED, history_bytes=1 << 20)


class SamRecipe(SamBased[TunedSam]):
    """A trainer whose result is the base with what it learned on top; the arguments are `SamBased`'s."""

    def views(self, now: Round, cases: Sequence[Case], *, still: bool) -> list[View]:
        """The objects of accepted cases as the base sees them, telling how far it is.

        Raises:
            InputError: (409) When there are none.
        """
        encoder, frame, found = self.encoder(self.base), self.frame, []
        limit = self.slices_each(len(cases), views=1 + CROPS)
        for case in now.counted("preparing", cases):
            assert case.label is not None
            image = self.basis.read(case.image)
            found += object_views(
                image,
                read_labelmap(case.label, image),
                case=case.case_id,
                labels=self.basis.labels,
                encoder=encoder,
                window=self.basis.window_for(image, {}),
                frame=frame,
                still=still,
                rng=np.random.default_rng([now.plan.settings.seed, zlib.crc32(case.case_id.encode())]),
                slices=case.slices,
                limit=limit,
            )
        if not found:
            raise no_objects(len(cases))
        return found

    def model(self, network: Any, training: Mapping[str, Any]) -> TunedSam:
        """A network with what using it needs."""
        return TunedSam(
            network=network,
            base=self.base.name,
            digest=self.base.digest,
            labels=self.basis.labels,
            window=self.basis.window,
            training=training,
        )

    def _champion(self, plan: Plan) -> TunedSam | None:
        """What is served: the published model, else the base as it is, used as the candidate will be."""
        return super()._champion(plan) or self._untuned(plan)

    def _untuned(self, plan: Plan) -> TunedSam:
        return untuned(self.base, labels=self.basis.labels, training=self.facts(plan))

    def facts(self, plan: Plan) -> dict[str, Any]:
        """What of a plan the use of its result depends on."""
        return {}

    def _load(self, path: Path, device: str) -> TunedSam:
        return load_tuned(path, self.base)

    def _save(self, path: Path, model: TunedSam) -> None:
        save_tuned(path, model)

    def _continues(self, model: TunedSam, plan: Plan) -> bool:
        return bool(model.fingerprint) and model.network.tuning == self.tuning(plan)


def no_objects(cases: int) -> InputError:
    """The error that there is no mask to learn from in any of so many cases."""
    remedy = "none of those for training holds any of the labels; accept a mask, then train again"
    return InputError("accepted cases", cases, remedy, status=409)
