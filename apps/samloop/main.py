"""The MONAI Label application: what `apps.samloop.models` makes, behind MONAI Label's interface."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from apps.samloop.batchinfer import batch_infer
from apps.samloop.clickboxes import click_boxes
from apps.samloop.home import home_of, is_remote
from apps.samloop.incoming import check_result_tag, check_tag
from apps.samloop.models import Models, cores
from apps.samloop.pacs.connect import dicom_datastore
from apps.samloop.pacs.refusals import NoVolumeError
from apps.samloop.pacs.store import DicomDatastore
from apps.samloop.project import Project, load_project, override
from apps.samloop.sessions import remove_expired
from apps.samloop.shared_cores import SharedCores
from apps.samloop.store import SafeDatastore
from sam_infer.ahead import EncodeAhead
from sam_infer.errors import InputError
from sam_infer.intensity import Window
from sam_infer.prompts.multi import BACKGROUND
from sam_infer.tasks.reply import LabelmapFile

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
        self.models = Models(self.project, self.home)
        self.library, self.encoder = self.models.library, self.models.encoder
        self.ahead = EncodeAhead(encoder=self.encoder, library=self.library)
        #: Told of each answer: the model's name, and the answer's JSON. The served application counts them.
        self.answered: Callable[[str, Mapping[str, Any]], None] = lambda model, params: None
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
        """The safe local store, the PACS's for a URL, or MONAI Label's own for XNAT and DSA."""
        if is_remote(self.studies) and settings.MONAI_LABEL_DATASTORE.lower() in ("xnat", "dsa"):
            return super().init_datastore()
        if is_remote(self.studies):
            return dicom_datastore(self.studies, self.home, self.project.labels, self.library.read)
        return SafeDatastore(
            self.studies,
            labels=self.project.labels,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, Any]:
        """The project's models."""
        return self.models.infers(self.datastore)

    def init_trainers(self) -> dict[str, Any]:
        """The project's trainers."""
        return self.models.trainers()

    def init_strategies(self) -> dict[str, Any]:
        """The project's strategies."""
        return self.models.strategies()

    def info(self) -> dict[str, Any]:
        """As stock; the statistics that viewers show, which are the first, are of the training that counts.

        It runs, or it was the last that trained the same model as the project's first trainer.
        """
        found = dict(super().info())
        stats = found["train_stats"]
        paths = {name: trainer.path for name, trainer in self._trainers.items()}
        first = next(iter(paths.values()), None)

        def order(name: str) -> tuple[bool, bool, int]:
            round_ = int(stats[name].get("round") or 0)
            return ("running" not in stats[name], paths[name] != first, -round_)

        found["train_stats"] = {name: stats[name] for name in sorted(stats, key=order)}
        return found

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
        save = str(request.get("save_label", False)).lower() == "true" and "image_path" not in request
        sent = request.get("label_tag")
        tag = check_result_tag(sent) if save else check_tag(str(sent or DefaultLabelTag.ORIGINAL.value))
        transient = request["transient"] = "image_path" in request
        request["image_id"] = None if transient else image_id
        request["image"] = request.pop("image_path", None) or self.image_path(image_id, datastore)
        if save:
            request["result_region"] = False
        drawn = click_boxes(request, self.library.read, self.project.labels)
        with self.ahead.request(), self.cores.request():
            file, params = task.answer(request)
        self.answered(request["model"], params)
        if drawn is not None:
            params["stored_boxes"] = drawn.store(self.models.boxes)
        if self.project.encode_ahead and self._server_mode and not transient and "window" in params:
            k = params.get("slice") if params.get("axis", 2) == 2 else None
            self.ahead.open(request["image"], window=Window(**params["window"]), k=k)
            params["embedding_progress"] = self.ahead.progress(request["image"])
        label = None
        if file is not None and save:
            label = self.keep(
                str(image_id), file, tag, {"model": request["model"], "params": params}, datastore
            )
        return file, {"label": label, "tag": tag, "params": params}

    def keep(
        self, image_id: str, file: LabelmapFile, tag: str, info: Mapping[str, Any], datastore: Datastore
    ) -> str:
        """Store a result.

        Args:
            image_id: Its image.
            file: The label map.
            tag: Any but final.
            info: What is stored of it; ``params`` is the reply's JSON.
            datastore: Where to.

        Returns:
            The label's id.

        Raises:
            InputError: When it holds a label that is none of the project.
        """
        names = info["params"].get("label_names", {})
        named = [{"name": name, "idx": value, "value": value} for name, value in names.items()]
        for unknown in (name for name in names if name not in self.project.labels):
            known = ", ".join(self.project.labels)
            raise InputError(
                "label", unknown, f"a result that is stored needs a label of the project: {known}"
            )
        path = file.write()
        try:
            return str(datastore.save_label(image_id, path, tag, {**info, "label_info": named}))
        finally:
            Path(path).unlink()

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

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """The next case by a strategy; series of a PACS that turn out to be no volume are passed over."""
        while True:
            try:
                return dict(super().next_sample(request))
            except NoVolumeError as error:
                logger.warning("The next case is another: %s", error)

    def server_mode(self, mode: bool) -> None:
        """Begin to serve, or end: what waits for the PACS is sent only while this process serves."""
        super().server_mode(mode)
        store = self.datastore()
        if isinstance(store, DicomDatastore):
            (store.start if mode else store.stop)()

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a model over many images; see `apps.samloop.batchinfer`. Returns the report's totals."""
        if not self._server_mode:
            os.nice(10)
        return batch_infer(self, request, datastore or self.datastore())

    def train(self, request: dict[str, Any]) -> Any:
        """Train; in a process of its own, with a low priority so that clicks stay fast."""
        if not self._server_mode:
            os.nice(10)
        return super().train(request)

    def cleanup_sessions(self) -> None:
        """Remove the sessions that have expired."""
        if (sessions := self.sessions()) is not None:
            remove_expired(sessions)

    def warm_up(self) -> None:
        """Load the engine and run it once, so that the first click does not pay for it."""
        from sam_infer.types import Prompts

        engine = self.encoder.engine
        embedding = engine.encode(np.zeros((64, 64), np.float32))
        point = Prompts(points=np.array([[32, 32]], np.float32), point_labels=np.array([1]))
        engine.decode(embedding, [point, Prompts(box=(16, 16, 48, 48))])
