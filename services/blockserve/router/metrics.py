"""The metrics of a router: its requests, how they changed workers, and the cluster as it sees it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.metrics_core import Metric as Family

from blockserve.common.api.engine import SizeHistogram
from blockserve.common.metrics import ProcessMetrics, RequestMetrics
from blockserve.common.metrics import cluster_catalogue as catalogue
from blockserve.common.metrics.cluster import view_families
from blockserve.common.metrics.engine import family, histogram_family
from blockserve.router.cluster.engine import ClusterEngine
from blockserve.router.settings import RouterSettings


class RouterMetrics(ProcessMetrics):
    """What one router counts.

    Attributes:
        requests: where the edge counts.
    """

    def __init__(self, settings: RouterSettings) -> None:
        """Make the metrics; nothing listens yet."""
        super().__init__(settings)
        self.requests = RequestMetrics(self.registry, max_labels=settings.metrics_max_labels)

    def watch(self, engine: ClusterEngine, seen: Callable[[], float]) -> None:
        """Show from now on what the engine did and sees.

        Args:
            engine: of the router.
            seen: `time.monotonic()` value of when its view was read last; 0 before.
        """
        self.show(lambda: _families(engine, seen()))


def _families(engine: ClusterEngine, seen: float) -> Iterable[Family]:
    yield from view_families(engine.view, seen, time.monotonic())
    yield family(catalogue.FAILOVERS, {(): engine.num_failovers})
    decisions = list(engine.kv.decisions.items())
    yield family(catalogue.KV_DECISIONS, {(what, reason.value): n for (what, reason), n in decisions})
    yield family(catalogue.KV_BANDWIDTH, {(): engine.kv.bytes_per_second})
    lengths = count_sizes(catalogue.PATH_BOUNDS, dict(engine.path_lengths))
    yield histogram_family(catalogue.PATH_WORKERS, {(): lengths})


def count_sizes(bounds: tuple[int, ...], counts: Mapping[int, int]) -> SizeHistogram:
    """A histogram of sizes of which it is known how often each came."""
    buckets = [0] * (len(bounds) + 1)
    for size, count in counts.items():
        buckets[bisect_left(bounds, size)] += count
    return SizeHistogram(bounds, tuple(buckets), sum(size * count for size, count in counts.items()))
