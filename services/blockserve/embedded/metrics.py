"""The metrics of an embedded server: what is counted, and the endpoint that shows it."""

from __future__ import annotations

import logging

from blockserve.common.engine_api import Engine
from blockserve.common.errors import ConfigurationError
from blockserve.common.metrics import (
    EngineCollector,
    MetricsEndpoint,
    MetricsRegistry,
    RequestMetrics,
    VariantCollector,
)
from blockserve.embedded.config import OFF, ServeConfig
from blockserve.router.resolve import ZooReader

log = logging.getLogger(__name__)


class ServerMetrics:
    """Owns the registry and the endpoint of one server.

    Attributes:
        requests: where the router counts.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Make the metrics; nothing listens yet."""
        self._config = config
        self._registry = MetricsRegistry()
        self._endpoint: MetricsEndpoint | None = None
        self.requests = RequestMetrics(self._registry, max_labels=config.metrics_max_labels)

    @property
    def address(self) -> str | None:
        """`host:port` of the endpoint; None while there is none."""
        return None if self._endpoint is None else self._endpoint.address

    def watch(self, engine: Engine, zoo: ZooReader) -> None:
        """Show from now on what the engine reports and what the zoo holds."""
        config = self._config
        self._registry.register(
            EngineCollector(
                engine.report, model_name=config.metrics_model_name, max_labels=config.metrics_max_labels
            )
        )
        self._registry.register(VariantCollector(zoo.variants, engine.report, self.requests.labels))

    def listen(self) -> None:
        """Answer scrapes, unless the settings say off.

        Raises:
            ConfigurationError: the address was chosen and cannot be used.
        """
        listen = self._config.metrics_listen
        if listen == OFF:
            return
        try:
            self._endpoint = MetricsEndpoint(listen, self._registry)
        except ConfigurationError:
            if "metrics_listen" in self._config.model_fields_set:
                raise
            # A second server on the machine, whose operator never heard of this port.
            free = f"{listen.rpartition(':')[0]}:0"
            self._endpoint = MetricsEndpoint(free, self._registry)
            log.warning("metrics: %s is taken, using a free port", listen)
        log.info("metrics address=http://%s/metrics", self._endpoint.address)

    def close(self) -> None:
        """Stop answering; blocks for a moment."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
