"""What a project serves, made from its parts: inference tasks, trainers and strategies by name.

The served application and `samloop predict` make them here, so that both answer alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore

from apps.samloop.project import Project
from sam_infer.autoclip import ClipOptions
from sam_infer.clip.model import ClipModel
from sam_infer.clip.source import ClipFolder
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines import registry
from sam_infer.engines.sam import SamEngine
from sam_infer.engines.tuned import TunedEngine
from sam_infer.errors import InputError
from sam_infer.library import ImageLibrary
from sam_infer.networks.classifier import load_classifier
from sam_infer.prompters import CamPrompter, ClipPrompter, NetPrompter, Prompter
from sam_infer.published import PublishedModel
from sam_infer.tasks.reply import LabelmapTask
from sam_infer.tasks.unet import UnetInfer
from sam_infer.text.descriptions import describe
from sam_infer.text.encoders import ClipTextEncoder, HashedTextEncoder, TextEncoder
from sam_infer.text.labeltexts import LabelTexts
from trainers.boxes import BoxStore
from trainers.preferences import PreferenceStore

#: Describes images to `strategies.diverse` where the project's engine keeps little more than the slice.
DESCRIBING_ENGINE = "sam_tiny"
#: Embeddings in memory of a SAM that learns beside the project's engine.
TUNED_BYTES = 128 << 20


class Models:
    """Makes what a project names. Nothing is loaded or written before it is used.

    Args:
        project: What is served.
        home: Where trained models, boxes and embeddings are kept.
        keep_embeddings: Whether embeddings may be written there, where the project wants that.
    """

    def __init__(self, project: Project, home: Path, *, keep_embeddings: bool = True) -> None:
        self.project = project
        self.home = home
        self.library = ImageLibrary(limit=project.volumes_mb << 20, ct=project.ct, other=project.other)
        self.store = embedding_store(project, home) if keep_embeddings else None
        learns = project.engine == project.tuned
        self.encoder = SliceEncoder(
            engine=self.tuned if learns else registry.create_engine(project.engine, **project.engine_options),
            store=self.store,
            embedding_bytes=project.embeddings_mb << 20,
        )
        self.boxes = BoxStore(home / "boxes")
        self.preferences = PreferenceStore(home / "preferences")

    @cached_property
    def unet(self) -> UnetInfer:
        """The published U-Net: served, and asked by others."""
        return UnetInfer(
            path=self.home / "models" / "unet.safetensors",
            labels=self.project.labels,
            window_for=self.library.window_for,
            read=self.library.read,
            device=self.project.device,
        )

    @cached_property
    def base(self) -> SamEngine:
        """The SAM that learns, as it was before."""
        engine = registry.create_engine(self.project.tuned, **self.project.tuned_options)
        assert isinstance(engine, SamEngine)
        return engine

    @cached_property
    def tuned(self) -> TunedEngine:
        """The SAM that learns, with what it learned."""
        path = self.home / "models" / "sam.safetensors"
        return TunedEngine(base=self.base, path=path, labels=self.project.labels)

    @cached_property
    def tuned_encoder(self) -> SliceEncoder:
        """The SAM that learns behind its caches: the project's encoder, where its engine is that SAM."""
        if self.encoder.engine is self.tuned:
            return self.encoder
        return SliceEncoder(engine=self.tuned, store=self.store, embedding_bytes=TUNED_BYTES)

    @cached_property
    def clip(self) -> ClipFolder:
        """The CLIP model."""
        return ClipFolder(self.project.clip, device=self.project.device)

    @cached_property
    def texts(self) -> LabelTexts:
        """What is said about the labels."""
        encoder: TextEncoder = HashedTextEncoder()
        if self.project.text_encoder == "clip":
            encoder = ClipTextEncoder(self._clip_model())
        return LabelTexts(
            self.project.texts, encoder=encoder, folder=self.home / "texts", device=self.project.device
        )

    @cached_property
    def descriptions(self) -> dict[str, str]:
        """The sentences about those labels that have one, without asking anyone."""
        own = self.project.texts.descriptions
        known = {name: own.get(name) or describe(name) for name in self.project.labels}
        return {name: text for name, text in known.items() if text}

    @cached_property
    def prompters(self) -> dict[str, Callable[[], Prompter]]:
        """Where automatic prompts come from; each raises an `InputError` (409) where it is not to be had."""
        cam = PublishedModel(
            self.home / "models" / "cam.safetensors",
            load=lambda path: load_classifier(path, device=self.project.device),
            labels=self.project.labels,
            train="POST /train/cam_classifier",
            minimum=4,
        )

        def published() -> Prompter:
            model, reason = cam.current()
            if model is None:
                raise InputError("prompts", "cam", reason, status=409)
            return CamPrompter(model=model)

        return {
            "unet": lambda: NetPrompter(model=self.unet.published("unet")),
            "cam": published,
            "clip": lambda: ClipPrompter(
                model=self._clip_model(), texts=self.descriptions, options=ClipOptions()
            ),
        }

    def _clip_model(self) -> ClipModel:
        model, reason = self.clip.current()
        if model is None:
            raise InputError("clip", None, reason, status=409)
        return model

    @cached_property
    def describing(self) -> SliceEncoder:
        """The encoder whose features describe images: the project's, unless it keeps their pixels only."""
        if self.encoder.engine.encoding is not None:
            return self.encoder
        engine = registry.create_engine(DESCRIBING_ENGINE, device=self.project.device)
        return SliceEncoder(engine=engine, store=self.encoder.store, embedding_bytes=0, history_bytes=0)

    def infers(self, datastore: Callable[[], Datastore] | None = None) -> dict[str, LabelmapTask]:
        """The project's inference tasks.

        Args:
            datastore: Gives the datastore; without one there is no task that answers with what it holds.
        """
        from apps.samloop.infers import make_infers

        return make_infers(self, datastore)

    def trainers(self) -> dict[str, Any]:
        """The project's trainers."""
        from apps.samloop.training import make_trainers

        return make_trainers(self)

    def strategies(self) -> dict[str, Any]:
        """The project's strategies."""
        from apps.samloop import strategies

        seen: Mapping[str, Any] = {"window_for": self.library.window_for, "read": self.library.read}
        makers: dict[str, Callable[[], Any]] = {
            "first": strategies.First,
            "random": strategies.RandomCase,
            "uncertainty": lambda: strategies.Uncertainty(model=self.unet.model, **seen),
            "disagreement": lambda: strategies.Disagreement(
                model=self.unet.model, encoder=self.encoder, **seen
            ),
            "diverse": lambda: strategies.Diverse(
                encoder=lambda: self.describing, name=self._describing_name, **seen
            ),
        }
        return {name: makers[name]() for name in self.project.strategies}

    @property
    def _describing_name(self) -> str:
        engine = self.encoder.engine
        return DESCRIBING_ENGINE if engine.encoding is None else engine.name


def embedding_store(project: Project, home: Path) -> EmbeddingStore | None:
    """Where embeddings are kept on disk; None where the project wants none."""
    if not project.embeddings_disk_mb:
        return None
    return EmbeddingStore(folder=home / "embeddings", limit=project.embeddings_disk_mb << 20)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
