"""The metrics of an embedded server: requests, the engine, and what the zoo holds."""

from __future__ import annotations

from blockserve.common.api.engine import Engine
from blockserve.common.metrics import EngineCollector, ProcessMetrics, RequestMetrics, VariantCollector
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.router.intake.catalog import ZooReader


class ServerMetrics(ProcessMetrics):
    """What one server counts.

    Attributes:
        requests: where the router counts.
    """

    def __init__(self, settings: EmbeddedSettings) -> None:
        """Make the metrics; nothing listens yet."""
        super().__init__(settings)
        self._settings = settings
        self.requests = RequestMetrics(self.registry, max_labels=settings.metrics_max_labels)

    def watch(self, engine: Engine, zoo: ZooReader) -> None:
        """Show from now on what the engine reports and what the zoo holds."""
        settings = self._settings
        self.registry.register(
            EngineCollector(
                engine.report, model_name=settings.metrics_model_name, max_labels=settings.metrics_max_labels
            )
        )
        self.registry.register(VariantCollector(zoo.variants, engine.report, self.requests.labels))
