"""Curves of a training for those who want to look at them: TensorBoard or MLflow, both in local files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

#: What a request may ask for, the default first.
TRACKERS = ("none", "tensorboard", "mlflow")


class Tracker(Protocol):
    """Takes figures."""

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Record figures of a step."""


@contextmanager
def tracking(kind: str, folder: Path, *, name: str, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """A tracker of one training, closed at the end.

    Args:
        kind: One of `TRACKERS`.
        folder: "tensorboard" and "mlflow" are made in it.
        name: Of the run.
        settings: Of the run, recorded with it.
    """
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard" / name)) as writer:
            writer.add_text("settings", repr(dict(settings)))
            yield _TensorBoard(writer)
    elif kind == "mlflow":
        import mlflow

        (folder / "mlflow").mkdir(parents=True, exist_ok=True)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow' / 'runs.db').resolve()}")
        if mlflow.get_experiment_by_name("samloop") is None:
            mlflow.create_experiment("samloop", (folder / "mlflow" / "artifacts").resolve().as_uri())
        mlflow.set_experiment("samloop")
        with mlflow.start_run(run_name=name):
            mlflow.log_params(dict(settings))
            yield _MLflow(mlflow)
    else:
        yield _Nothing()


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def figures(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class _MLflow:
    def __init__(self, mlflow: Any) -> None:
        self._mlflow = mlflow

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)


class _Nothing:
    def figures(self, values: Mapping[str, float], step: int) -> None:
        pass
