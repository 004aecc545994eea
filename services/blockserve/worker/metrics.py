"""The metrics of a worker: its engine, its streams to other workers, and whether the cluster knows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.metrics_core import Metric as Family

from blockserve.common.api.cluster import WorkerId
from blockserve.common.api.engine import EngineReport
from blockserve.common.metrics import EngineCollector, ProcessMetrics
from blockserve.common.metrics import cluster_catalogue as catalogue
from blockserve.common.metrics.engine import Values, family
from blockserve.common.metrics.labels import BoundedLabels
from blockserve.worker.announcer import Announcer
from blockserve.worker.peers.streams import PeerStreams
from blockserve.worker.settings import WorkerSettings


class WorkerMetrics(ProcessMetrics):
    """What one worker counts."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Make the metrics; nothing listens yet."""
        super().__init__(settings)
        self._settings = settings
        self._peers = BoundedLabels(settings.metrics_max_labels)

    def watch(self, report: Callable[[], EngineReport], streams: PeerStreams, announcer: Announcer) -> None:
        """Show from now on what these say."""
        settings = self._settings
        self.registry.register(
            EngineCollector(
                report, model_name=settings.metrics_model_name, max_labels=settings.metrics_max_labels
            )
        )
        self.show(lambda: stream_families(streams, self._peers))
        self.show(lambda: _families(report(), announcer))


def stream_families(streams: PeerStreams, labels: BoundedLabels) -> Iterable[Family]:
    """What is known of each stream that is open; the labels of those that have ended become free."""
    in_flight = streams.in_flight_bytes()
    labels.retain(in_flight)
    hops = {worker: seconds for worker, seconds in streams.hop_seconds().items() if worker in in_flight}
    pauses = streams.window_pauses()
    yield family(catalogue.HOP_SECONDS, _by_label(hops, labels, max))
    yield family(catalogue.IN_FLIGHT_BYTES, _by_label(in_flight, labels, _add))
    yield family(
        catalogue.WINDOW_FULL, _by_label({one: pauses.get(one, 0) for one in in_flight}, labels, _add)
    )


def _families(report: EngineReport, announcer: Announcer) -> Iterable[Family]:
    yield family(catalogue.FOLLOWED, {(): report.requests_begun_elsewhere})
    yield family(catalogue.LEASE_KNOWN, {(): announcer.is_known})
    told = announcer.told_at
    yield family(catalogue.LEASE_AGE, {(): time.monotonic() - told} if told else {})


def _by_label(
    values: Mapping[WorkerId, float], labels: BoundedLabels, join: Callable[[float, float], float]
) -> Values:
    """Values by the label of their worker; those of one label are joined."""
    found: dict[tuple[str, ...], float] = {}
    for worker, value in values.items():
        label = (labels.of(worker),)
        found[label] = join(found[label], value) if label in found else value
    return found


def _add(one: float, other: float) -> float:
    return one + other
