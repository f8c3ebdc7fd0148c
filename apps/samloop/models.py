"""What a project serves, made from its parts: inference tasks, trainers and strategies by name.

The served application and `samloop predict` make them here, so that both answer alike.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore

from apps.samloop.project import Project
from apps.samloop.store import HOME
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines import registry
from sam_infer.library import ImageLibrary
from sam_infer.tasks.reply import LabelmapTask
from sam_infer.tasks.unet import UnetInfer
from trainers.boxes import BoxStore
from trainers.preferences import PreferenceStore

#: Describes images to `strategies.diverse` where the project's engine keeps little more than the slice.
DESCRIBING_ENGINE = "sam_tiny"


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
        self.encoder = SliceEncoder(
            engine=registry.create_engine(project.engine, **project.engine_options),
            store=embedding_store(project, home) if keep_embeddings else None,
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
        seen: dict[str, Any] = {"encoder": self.encoder, "library": self.library}
        labels = self.project.labels

        def click(dimension: int) -> LabelmapTask:
            from sam_infer.tasks.click import ClickInfer

            return ClickInfer(**seen, dimension=dimension, options={"store_boxes": False})

        def multi() -> LabelmapTask:
            from sam_infer.tasks.multi import MultiInfer

            return MultiInfer(**seen, labels=labels)

        def scribble() -> LabelmapTask:
            from sam_infer.tasks.scribble import ScribbleInfer

            return ScribbleInfer(**seen)

        def auto_net() -> LabelmapTask:
            from sam_infer.tasks.autonet import AutoNetInfer

            return AutoNetInfer(unet=self.unet, **seen, labels=labels)

        def auto_cam() -> LabelmapTask:
            from sam_infer.tasks.autocam import AutoCamInfer

            path, device = self.home / "models" / "cam.safetensors", self.project.device
            return AutoCamInfer(path=path, **seen, labels=labels, device=device)

        def stored() -> LabelmapTask:
            from apps.samloop.proposals import StoredProposal

            assert datastore is not None
            return StoredProposal(datastore=datastore, labels=labels, read=self.library.read)

        makers: dict[str, Callable[[], LabelmapTask]] = {
            "sam_click_2d": lambda: click(2),
            "sam_click_3d": lambda: click(3),
            "sam_multi": multi,
            "sam_scribble": scribble,
            "unet": lambda: self.unet,
            "sam_auto_net": auto_net,
            "sam_auto_cam": auto_cam,
            "pseudo_label": stored,
        }
        absent = {"pseudo_label"} if datastore is None else set()
        return {name: makers[name]() for name in self.project.models if name not in absent}

    def trainers(self) -> dict[str, Any]:
        """The project's trainers."""
        from trainers.basis import Basis

        basis = Basis(
            model_dir=self.home / "models",
            labels=self.project.labels,
            window_for=self.library.window_for,
            window=self.project.window,
            read=self.library.read,
            held_out=self.project.held_out,
            group=self.project.group,
            threads=max(1, cores() - 1),
        )

        def unet() -> Any:
            from trainers.unet import UnetTrainer

            return UnetTrainer(basis)

        def pseudo_label() -> Any:
            from trainers.pseudo_label import PseudoLabelTrainer

            return PseudoLabelTrainer(basis, encoder=self.encoder)

        def self_training() -> Any:
            from trainers.pseudo_label import SelfTrainingTrainer

            return SelfTrainingTrainer(basis)

        def mean_teacher() -> Any:
            from trainers.mean_teacher import MeanTeacherTrainer

            return MeanTeacherTrainer(basis)

        def weak_box() -> Any:
            from trainers.weak_box import WeakBoxTrainer

            return WeakBoxTrainer(basis, encoder=self.encoder, boxes=self.boxes)

        def cam_classifier() -> Any:
            from trainers.cam_classifier import CamClassifierTrainer

            return CamClassifierTrainer(basis, csv=self.project.image_labels)

        makers = {
            "unet": unet,
            "cam_classifier": cam_classifier,
            "pseudo_label": pseudo_label,
            "self_training": self_training,
            "mean_teacher": mean_teacher,
            "weak_box": weak_box,
        }
        return {name: makers[name]() for name in self.project.trainers}

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


def home_of(studies: str) -> Path:
    """Where models and history are kept: beside local images, in the user's cache for a URL."""
    if studies.startswith(("http://", "https://")):
        name = hashlib.sha256(studies.rstrip("/").encode()).hexdigest()[:16]
        return Path.home() / ".cache" / "samloop" / name
    return Path(studies).expanduser().resolve() / HOME
