"""The metrics of a controller: whether it leads, and what it decided."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client.metrics_core import Metric as Family

from blockserve.common.metrics import ProcessMetrics
from blockserve.common.metrics import cluster_catalogue as catalogue
from blockserve.common.metrics.cluster import view_families
from blockserve.common.metrics.engine import family
from blockserve.controller.planning.planner import Planner


class ControllerMetrics(ProcessMetrics):
    """What one controller counts."""

    def watch(self, planner: Planner) -> None:
        """Show from now on what the planner says."""
        self.show(lambda: _families(planner))


def _families(planner: Planner) -> Iterable[Family]:
    yield from view_families(planner.view, planner.seen, time.monotonic())
    counts = planner.counts
    for info, value in (
        (catalogue.LEADING, planner.leads),
        (catalogue.PLANNING_SECONDS, counts.seconds),
        (catalogue.PLACEMENTS, counts.placements),
        (catalogue.PLACEMENT_LOADS, counts.loads),
        (catalogue.PLACEMENT_UNLOADS, counts.unloads),
        (catalogue.PLACEMENT_BYTES, counts.moved_bytes),
        (catalogue.PLACEMENT_REFUSED, counts.refused_writes),
        (catalogue.LEFT_OUT, len(planner.left_out)),
    ):
        yield family(info, {(): value})
