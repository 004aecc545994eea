"""What a server counts, and how Prometheus reads it.

`catalogue` names every metric once; `requests` counts at the edge, `engine` translates the engine's report at
each scrape, `variants` says what is registered and loaded, `endpoint` answers over HTTP. Every server has a
registry of its own (`registry`): nothing here is global.
"""

from blockserve.common.metrics.endpoint import MetricsEndpoint
from blockserve.common.metrics.engine import EngineCollector
from blockserve.common.metrics.registry import MetricsRegistry
from blockserve.common.metrics.requests import AnswerMeter, RequestMeter, RequestMetrics
from blockserve.common.metrics.variants import VariantCollector

__all__ = [
    "AnswerMeter",
    "EngineCollector",
    "MetricsEndpoint",
    "MetricsRegistry",
    "RequestMeter",
    "RequestMetrics",
    "VariantCollector",
]
