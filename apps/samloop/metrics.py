"""What the server counts, for Prometheus. Labels name routes, models and states, never cases or people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    Summary,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Seconds; a click of the bundled engine takes less than 0.1, one of a large engine on a CPU some.
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}


class Gauge:
    """A value that is looked up when it is asked for.

    Args:
        name: Its name, without the application's.
        help: What it says.
        look: Values by label value; "" where there is no label.
        label: Name of the label, or none.
    """

    def __init__(
        self, name: str, help: str, look: Callable[[], Mapping[str, float]], label: str = ""
    ) -> None:
        self.name = f"samloop_{name}"
        self.help = help
        self.look = look
        self.label = label

    def family(self) -> Metric:
        """As Prometheus takes it."""
        family = GaugeMetricFamily(self.name, self.help, labels=[self.label] if self.label else None)
        for value, number in self.look().items():
            family.add_metric([value] if self.label else [], float(number))
        return family


class Metrics(Collector):
    """The counters of one application, in a registry of their own.

    Args:
        gauges: What is looked up.
    """

    def __init__(self, gauges: Iterable[Gauge] = ()) -> None:
        self._gauges = list(gauges)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        own: dict[str, Any] = {"registry": self._registry, "namespace": "samloop"}
        self._requests = Counter("requests", "Requests answered.", ["method", "route", "status"], **own)
        self._seconds = Histogram(
            "request_seconds", "Seconds to the end of an answer.", ["route"], buckets=_BUCKETS, **own
        )
        self._infer = Summary(
            "infer_seconds", "Seconds of an inference, by stage.", ["model", "stage"], **own
        )
        self._embeddings = Counter(
            "embeddings", "Inferences by whether a slice had to be encoded.", ["cached"], **own
        )

    def describe(self) -> Iterable[Metric]:
        """Nothing: what the gauges say is looked up only when it is asked for."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The gauges."""
        return [gauge.family() for gauge in self._gauges]

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            method: Its method.
            route: Its route's template, as in ``/infer/{model}``; "-" where it reached none.
            status: HTTP status.
            seconds: To the end of the answer.
        """
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def answered(self, model: str, params: Mapping[str, Any]) -> None:
        """Count an inference.

        Args:
            model: Its name.
            params: The answer's JSON.
        """
        for stage, seconds in params.get("latencies", {}).items():
            self._infer.labels(model, stage).observe(float(seconds))
        if "embedding_cached" in params:
            self._embeddings.labels(str(bool(params["embedding_cached"])).lower()).inc()

    def render(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)
