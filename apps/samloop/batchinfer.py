"""Batch inference over the datastore: results are stored with what they follow from, never as accepted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.datastore import Datastore

from apps.samloop.batch import Case, Entry, Job, run_batch, runnable
from apps.samloop.incoming import check_result_tag
from sam_infer.tasks.reply import LabelmapTask

if TYPE_CHECKING:
    from apps.samloop.main import SamloopApp

logger = logging.getLogger(__name__)
#: What a client may ask a model with, beside the options that the model itself offers.
SETTINGS = ("labels", "window_level", "window_width", "result_extension")


def report_path(app: SamloopApp, model: str) -> Path:
    """Where the report of a model's batches lies."""
    return Path(app.home, "batch", f"{model}.json")


def settings_of(task: LabelmapTask, request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request a model is asked with."""
    known = {*SETTINGS, *task.config()}
    return {key: value for key, value in request.items() if key in known}


def batch_infer(app: SamloopApp, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
    """Run a model over images of the datastore.

    Args:
        app: The application.
        request: ``model``; ``images`` (all, labeled or unlabeled); ``label_tag``; ``max_batch_size``
            (0 = all); ``restart``; see `settings_of`.
        datastore: Where images are, and results go.

    Returns:
        The report without its cases; the whole of it is in `report_path`.

    Raises:
        InputError: When the model needs prompts, or is not trained.
    """
    name = str(request.get("model"))
    task = runnable(app._infers, name)
    tag = check_result_tag(request.get("label_tag"))
    settings = settings_of(task, request)
    job = Job(model=name, fingerprint=task.fingerprint(), settings={**settings, "label_tag": tag})

    def work(case: Case, path: Path, mark: str) -> Mapping[str, Any]:
        asked = {**settings, "model": name, "image": case.name, "result_region": False}
        file, answer = app.answer(asked, datastore)
        if file is not None:
            made = {"model": name, "fingerprint": job.fingerprint, "settings": settings, "mark": mark}
            info = {"model": name, "params": answer["params"], "provenance": made}
            app.keep(case.name, file, tag, info, datastore)
        return dict(answer["params"])

    cases = [_case(app, image_id, tag, datastore) for image_id in _images(request, datastore)]
    report = run_batch(
        cases,
        job,
        work,
        report=report_path(app, name),
        restart=bool(request.get("restart")),
        tell=_tell,
    )
    return {key: value for key, value in report.items() if key not in ("cases", "earlier")}


def _images(request: Mapping[str, Any], datastore: Datastore) -> list[str]:
    which = request.get("images", "all")
    lists = {"labeled": datastore.get_labeled_images, "unlabeled": datastore.get_unlabeled_images}
    found = sorted(lists.get(str(getattr(which, "value", which)), datastore.list_images)())
    return found[: int(request.get("max_batch_size") or 0) or None]


def _case(app: SamloopApp, image_id: str, tag: str, datastore: Datastore) -> Case:
    def kept(entry: Entry) -> bool:
        if tag not in datastore.get_labels_by_image_id(image_id):
            return False
        made = datastore.get_label_info(image_id, tag).get("provenance")
        return isinstance(made, Mapping) and made.get("mark") == entry["mark"]

    return Case(name=image_id, find=lambda: Path(app.image_path(image_id, datastore)), kept=kept)


def _tell(report: Mapping[str, Any]) -> None:
    counts = ", ".join(f"{report[status]} {status}" for status in ("done", "skipped", "failed"))
    rest = report["seconds_left"]
    logger.info(
        "%s: %s of %d%s", report["model"], counts, report["total"], f", {rest:.0f} s left" if rest else ""
    )
