"""What every process that follows a cluster shows of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric as Family

from blockserve.common.api.cluster import ClusterView, WorkerState
from blockserve.common.metrics import cluster_catalogue as catalogue
from blockserve.common.metrics.engine import family


def view_families(view: ClusterView, seen: float, now: float) -> Iterable[Family]:
    """Workers and placement as last read.

    Args:
        view: what was read.
        seen: when, on the clock of `now`, seconds; 0 for never, and then there is no age to show.
        now: seconds.
    """
    states = Counter(worker.record.state for worker in view.workers.values())
    yield family(catalogue.WORKERS, {(state.value,): states[state] for state in WorkerState})
    yield family(catalogue.VIEW_AGE, {(): now - seen} if seen else {})
    yield family(catalogue.PLACEMENT_VERSION, {(): view.placement.version})
