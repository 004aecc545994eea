"""The registry of one server."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import Metric as Family

_CREATED = "_created"


class MetricsRegistry(CollectorRegistry):
    """The metrics of one server, its process's memory, processor time and open files among them."""

    def __init__(self) -> None:
        """Make a registry that holds the process's own metrics and nothing else."""
        super().__init__()
        ProcessCollector(registry=self)

    def collect(self) -> Iterable[Family]:
        """All families, without the `_created` series that no dashboard reads and every variant pays for."""
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith(_CREATED)]
            yield family
