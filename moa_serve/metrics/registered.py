"""Registered: metrics of the client library, for what is counted when it happens. Belongs to the event loop."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, Summary, generate_latest

from moa_serve.metrics.family import Family, Wanted

_M = TypeVar("_M", Counter, Gauge, Histogram, Summary)


class Registered:
    """A registry that knows its families, and whose series of one adapter can go together."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.families: list[Family] = []
        self._by_adapter: list[tuple[Counter | Gauge | Histogram | Summary, str]] = []

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._know(Counter(name, text, labels, registry=self._registry), Family(f"{name}_total", "counter", text, labels))

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._know(Gauge(name, text, labels, registry=self._registry), Family(name, "gauge", text, labels))

    def summary(self, name: str, text: str, *labels: str) -> Summary:
        return self._know(Summary(name, text, labels, registry=self._registry), Family(name, "summary", text, labels))

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        metric = Histogram(name, text, labels, buckets=buckets, registry=self._registry)
        return self._know(metric, Family(name, "histogram", text, labels, tuple(buckets)))

    def _know(self, metric: _M, family: Family) -> _M:
        self.families.append(family)
        for label in ("adapter", "model_name"):
            if label in family.labels:
                self._by_adapter.append((metric, label))
        return metric

    def forget(self, adapter: str) -> None:
        """Remove every series of an adapter."""
        for metric, label in self._by_adapter:
            metric.remove_by_labels({label: adapter})

    def text(self, wanted: Wanted) -> bytes:
        """In any thread."""
        registry = self._registry if wanted.names is None else self._registry.restricted_registry(wanted.names)
        return generate_latest(_WithoutCreated(registry.collect()))


class _WithoutCreated:
    """Metrics without the `_created` series, which double the lines of counters and which the text format does not have."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        for metric in self._metrics:
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
