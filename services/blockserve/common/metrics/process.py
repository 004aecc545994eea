"""The metrics of one process: its registry, and the endpoint that shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from blockserve.common.errors import ConfigurationError
from blockserve.common.metrics.endpoint import MetricsEndpoint
from blockserve.common.metrics.registry import MetricsRegistry
from blockserve.common.metrics.settings import OFF, MetricsSettings

log = logging.getLogger(__name__)


class ProcessMetrics:
    """Owns the registry and the endpoint of one process.

    Attributes:
        registry: of all that the process counts.
    """

    def __init__(self, settings: MetricsSettings) -> None:
        """Make the registry; nothing listens yet."""
        self._settings = settings
        self._endpoint: MetricsEndpoint | None = None
        self.registry = MetricsRegistry()

    @property
    def address(self) -> str | None:
        """`host:port` of the endpoint; None while there is none."""
        return None if self._endpoint is None else self._endpoint.address

    def listen(self) -> None:
        """Answer scrapes, unless the settings say off.

        Raises:
            ConfigurationError: the address was chosen and cannot be used.
        """
        listen = self._settings.metrics_listen
        if listen == OFF:
            return
        try:
            self._endpoint = MetricsEndpoint(listen, self.registry)
        except ConfigurationError:
            if "metrics_listen" in self._settings.model_fields_set:
                raise
            # A second server on the machine, whose operator never heard of this port.
            free = f"{listen.rpartition(':')[0]}:0"
            self._endpoint = MetricsEndpoint(free, self.registry)
            log.warning("metrics: %s is taken, using a free port", listen)
        log.info("metrics address=http://%s/metrics", self._endpoint.address)

    def close(self) -> None:
        """Stop answering; blocks for a moment."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def show(self, families: Callable[[], Iterable[Family]]) -> None:
        """Show what a function says at each scrape, in the thread that answers it."""
        self.registry.register(_AtScrape(families))


class _AtScrape(Collector):
    """Asks when somebody asks us: between scrapes it costs nothing."""

    def __init__(self, families: Callable[[], Iterable[Family]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        """What there is to say now."""
        return self._families()

    def describe(self) -> Iterable[Family]:
        """Nothing: registering asks for no values."""
        return ()
