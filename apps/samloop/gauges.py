"""What is looked up when the server's counters are asked for: the store, what waits, what runs, the PACS."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from monailabel.utils.async_tasks.utils import background_tasks

from apps.samloop.bodies import Disks
from apps.samloop.lifecycle import Remote
from apps.samloop.metrics import Gauge, Metrics
from apps.samloop.pool import InferPool

logger = logging.getLogger(__name__)


def metrics_of(instance: Any, pool: InferPool, disks: Disks) -> Metrics:
    """The counters of an application.

    Args:
        instance: The application.
        pool: Where it infers.
        disks: What must not fill.
    """

    def cases() -> Mapping[str, float]:
        found = instance.datastore().status()
        return {"all": found["total"], "accepted": found["completed"]}

    def remote(key: str) -> Callable[[], Mapping[str, float]]:
        def look() -> Mapping[str, float]:
            store = instance.datastore()
            return {"": float(store.state()[key])} if isinstance(store, Remote) else {}

        return look

    def trainings() -> Mapping[str, float]:
        return Counter(task["status"].lower() for task in list(background_tasks.get("train", ())))

    def published() -> Mapping[str, float]:
        stats = {name: trainer.stats() for name, trainer in instance._trainers.items()}
        return {name: float(bool(one["published"])) for name, one in stats.items() if "published" in one}

    return Metrics(
        [
            Gauge("cases", "Cases in the store.", _safe(cases), "kind"),
            Gauge("infer_waiting", "Inferences that wait.", lambda: {"": pool.waiting}),
            Gauge("infer_running", "Inferences that run.", lambda: {"": pool.running}),
            Gauge("trainings", "Trainings since the start, by status.", _safe(trainings), "status"),
            Gauge("published", "Whether a trainer's last round was published.", _safe(published), "trainer"),
            Gauge("room_bytes", "Bytes that uploads may still take.", _safe(lambda: {"": disks.look()})),
            Gauge("pacs_reachable", "Whether the PACS answers.", _safe(remote("reachable"))),
            Gauge("pacs_waiting", "Accepted labels that wait to be sent there.", _safe(remote("waiting"))),
        ]
    )


def _safe(look: Callable[[], Mapping[str, float]]) -> Callable[[], Mapping[str, float]]:
    """Nothing where it cannot be told: the other counters must still be read."""

    def told() -> Mapping[str, float]:
        try:
            return look()
        except Exception:
            logger.exception("A counter cannot be told")
            return {}

    return told
