"""The MONAI Label application: registers what the project file names, nothing else."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from apps.samloop.incoming import check_tag
from apps.samloop.project import Project, load_project, override
from apps.samloop.shared_cores import SharedCores
from apps.samloop.store import HOME, SafeDatastore
from sam_infer.ahead import EncodeAhead
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.registry import create_engine
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary
from sam_infer.prompts.multi import BACKGROUND
from sam_infer.tasks.click import ClickInfer
from sam_infer.tasks.multi import MultiInfer
from sam_infer.tasks.reply import LabelmapFile
from sam_infer.tasks.scribble import ScribbleInfer

logger = logging.getLogger(__name__)


class SamloopApp(MONAILabelApp):
    """samloop as MONAI Label sees it.

    Args:
        app_dir: This folder.
        studies: Folder of images, or the URL of a DICOMweb server.
        conf: ``project`` (file), ``labels`` (comma separated), ``engine``, ``weights`` and ``runtime``
            override the default project.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        conf = conf or {}
        path = conf.get("project")
        self.project: Project = override(
            load_project(Path(path) if path else None),
            labels=conf.get("labels"),
            engine=conf.get("engine"),
            weights=conf.get("weights"),
            runtime=conf.get("runtime"),
        )
        self.home = home_of(studies)
        torch.set_num_threads(max(1, cores() // self.project.infer_workers))
        self.cores = SharedCores(cores())
        self.library = ImageLibrary(
            limit=self.project.volumes_mb << 20, ct=self.project.ct, other=self.project.other
        )
        self.encoder = SliceEncoder(
            engine=create_engine(self.project.engine, **self.project.engine_options),
            store=embedding_store(self.project, self.home),
            embedding_bytes=self.project.embeddings_mb << 20,
        )
        self.ahead = EncodeAhead(encoder=self.encoder, library=self.library)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=self.project.name,
            description="SAM proposes, the clinician corrects and accepts, the models learn",
            labels=self._listed_labels(),
        )

    def _listed_labels(self) -> list[str]:
        """The labels in /info/: 3D Slicer sends points of these names only, of "background" too."""
        return [*self.project.labels, *([BACKGROUND] if "sam_multi" in self.project.models else [])]

    def init_datastore(self) -> Datastore:
        """The safe local store, or MONAI Label's own for a URL."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return SafeDatastore(
            self.studies,
            labels=self.project.labels,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, Any]:
        """The project's models."""

        def unet() -> Any:
            from sam_infer.tasks.unet import UnetInfer

            return UnetInfer(
                path=self.home / "models" / "unet.safetensors",
                labels=self.project.labels,
                window_for=self.library.window_for,
                read=self.library.read,
                device=self.project.device,
            )

        makers = {
            "sam_click_2d": lambda: ClickInfer(encoder=self.encoder, library=self.library, dimension=2),
            "sam_click_3d": lambda: ClickInfer(encoder=self.encoder, library=self.library, dimension=3),
            "sam_multi": lambda: MultiInfer(
                encoder=self.encoder, library=self.library, labels=self.project.labels
            ),
            "sam_scribble": lambda: ScribbleInfer(encoder=self.encoder, library=self.library),
            "unet": unet,
        }
        return {name: makers[name]() for name in self.project.models}

    def init_trainers(self) -> dict[str, Any]:
        """The project's trainers."""

        def unet() -> Any:
            from trainers.unet import UnetTrainer

            return UnetTrainer(
                model_dir=self.home / "models",
                labels=self.project.labels,
                window_for=self.library.window_for,
                window=self.project.window,
                read=self.library.read,
                held_out=self.project.held_out,
                group=self.project.group,
                threads=max(1, cores() - 1),
            )

        makers = {"unet": unet}
        return {name: makers[name]() for name in self.project.trainers}

    def init_strategies(self) -> dict[str, Any]:
        """The project's strategies."""
        from apps.samloop.strategies import First, RandomCase, Uncertainty

        unet = self._infers.get("unet")
        makers = {
            "first": First,
            "random": RandomCase,
            "uncertainty": lambda: Uncertainty(
                model=unet.model if unet else lambda: None,
                window_for=self.library.window_for,
                read=self.library.read,
            ),
        }
        return {name: makers[name]() for name in self.project.strategies}

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """`answer` with its label map as a file, ``file``, which the caller removes."""
        file, result = self.answer(request, datastore)
        path = file.write() if file is not None else None
        return {**result, "label": result["label"] or path, "file": path}

    def answer(
        self, request: dict[str, Any], datastore: Datastore | None = None
    ) -> tuple[LabelmapFile | None, dict[str, Any]]:
        """Run one inference.

        Args:
            request: ``model``; ``image``, an id of the datastore, or ``image_path``, a file that the server
                itself received (never from a client); the model's own parameters; ``save_label`` and
                ``label_tag`` store the result.
            datastore: Another datastore than the application's.

        Returns:
            The label map, and ``label`` (its id where it was stored), ``tag``, ``params`` (JSON).
        """
        task = self._infers.get(request.get("model", ""))
        if task is None:
            raise InputError(
                "model", request.get("model"), f"choose one of {', '.join(self._infers)}", status=404
            )
        datastore = datastore or self.datastore()
        request = dict(request)
        image_id = request.get("image")
        tag = check_tag(str(request.get("label_tag") or DefaultLabelTag.ORIGINAL.value))
        save = str(request.get("save_label", False)).lower() == "true" and "image_path" not in request
        if save and tag == DefaultLabelTag.FINAL.value:
            raise InputError(
                "label_tag", tag, "a result is not accepted by the one who made it; use another tag"
            )
        transient = request["transient"] = "image_path" in request
        request["image"] = request.pop("image_path", None) or self.image_path(image_id, datastore)
        if save:
            request["result_region"] = False
        with self.ahead.request(), self.cores.request():
            file, params = task.answer(request)
        if self.project.encode_ahead and self._server_mode and not transient:
            k = params.get("slice") if params.get("axis", 2) == 2 else None
            self.ahead.open(request["image"], window=Window(**params["window"]), k=k)
            params["embedding_progress"] = self.ahead.progress(request["image"])
        label = None
        if file is not None and save:
            named = [{"name": n, "idx": v, "value": v} for n, v in params.get("label_names", {}).items()]
            for unknown in (entry["name"] for entry in named if entry["name"] not in self.project.labels):
                known = ", ".join(self.project.labels)
                raise InputError(
                    "label", unknown, f"a result that is stored needs a label of the project: {known}"
                )
            info = {"model": request["model"], "params": params, "label_info": named}
            path = file.write()
            try:
                label = datastore.save_label(image_id, path, tag, info)
            finally:
                Path(path).unlink()
        return file, {"label": label, "tag": tag, "params": params}

    def prefetch(self, image_id: str) -> None:
        """Read a case, and encode its slices, before its first click."""
        if self.project.encode_ahead and self._server_mode:
            self.ahead.open(self.image_path(image_id))

    def image_path(self, image_id: object, datastore: Datastore | None = None) -> str:
        """The file of an image id.

        Raises:
            InputError: (404) When the datastore has no such image.
        """
        uri = (datastore or self.datastore()).get_image_uri(image_id) if isinstance(image_id, str) else ""
        if not uri or not image_id:
            raise InputError(
                "image",
                image_id,
                "no such image in the datastore; GET /datastore/?output=all lists them",
                status=404,
            )
        return str(uri)

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> Any:
        """Batch inference; an image that fails is reported, and the others go on."""
        if not torch.cuda.is_available():
            request = {**request, "multi_gpu": False, "device": "cpu"}

        def infer(one: dict[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                return self.infer(one, store)
            except Exception as error:
                logger.warning("Image %s failed: %s", one.get("image"), error)
                return {"error": str(error)}

        return self._batch_infer(request, datastore or self.datastore(), infer)

    def train(self, request: dict[str, Any]) -> Any:
        """Train; in a process of its own, with a low priority so that clicks stay fast."""
        if not self._server_mode:
            os.nice(10)
        return super().train(request)

    def warm_up(self) -> None:
        """Load the engine and run it once, so that the first click does not pay for it."""
        from sam_infer.types import Prompts

        engine = self.encoder.engine
        embedding = engine.encode(np.zeros((64, 64), np.float32))
        point = Prompts(points=np.array([[32, 32]], np.float32), point_labels=np.array([1]))
        engine.decode(embedding, [point, Prompts(box=(16, 16, 48, 48))])


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
