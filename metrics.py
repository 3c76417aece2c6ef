"""What does Prometheus see? A collector over reads.py, in a registry of its own; it reads when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from reads import Reads

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The text of GET /metrics. `gauges` are further figures: {name: (what it is, function)}, such as queue lengths."""

    def __init__(
        self,
        reads: Reads,
        *,
        now: Callable[[], float],
        device_timeout: float,
        version: str,
        gauges: Mapping[str, tuple[str, Callable[[], float]]] | None = None,
    ) -> None:
        self._reads, self._now, self._device_timeout, self._version = reads, now, device_timeout, version
        self._gauges = dict(gauges or {})
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # type: ignore[arg-type,unused-ignore]

    def render(self) -> bytes:
        """The exposition text; raises ReadsBusy when no connection is free."""
        return bytes(generate_latest(self._registry))

    def describe(self) -> list[Metric]:
        return []  # known only when collected; an empty list keeps the registry from collecting at once

    def collect(self) -> Iterator[Metric]:
        now = self._now()
        version = GaugeMetricFamily("af_build_info", "The master's version; always 1.", labels=["version"])
        version.add_metric([self._version], 1)
        yield version
        yield _family("af_tasks", "Tasks kept, by state.", "state", self._reads.counts_by_state())
        by_status = self._reads.devices_by_status(now, self._device_timeout)
        yield _family("af_devices", "Devices, by status.", "status", by_status)
        attempts = CounterMetricFamily("af_attempts", "Attempts that ended, by outcome.", labels=["outcome"])
        for outcome, count in self._reads.attempt_totals().items():
            attempts.add_metric([outcome], count)
        yield attempts
        oldest = self._reads.oldest_waiting(now)
        waiting = oldest["waiting_seconds"] if oldest else 0.0
        yield GaugeMetricFamily("af_oldest_waiting_seconds", "How long the oldest pending task waits.", value=waiting)
        yield GaugeMetricFamily("af_database_bytes", "Database file and log.", value=self._reads.database_bytes())
        for name, (text, value) in self._gauges.items():
            yield GaugeMetricFamily(name, text, value=value())


def _family(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
