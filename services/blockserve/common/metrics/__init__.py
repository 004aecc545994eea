"""What a server counts, and how Prometheus reads it.

`catalogue` names every metric once; `requests` counts at the edge, `engine` translates the engine's report at
each scrape, `variants` says what is registered and loaded, `cluster` what a process sees of a cluster,
`endpoint` answers over HTTP. Every process (`process`) has a registry of its own (`registry`).
"""

from blockserve.common.metrics.endpoint import MetricsEndpoint
from blockserve.common.metrics.engine import EngineCollector
from blockserve.common.metrics.process import ProcessMetrics
from blockserve.common.metrics.registry import MetricsRegistry
from blockserve.common.metrics.requests import AnswerMeter, RequestMeter, RequestMetrics
from blockserve.common.metrics.variants import VariantCollector

__all__ = [
    "AnswerMeter",
    "EngineCollector",
    "MetricsEndpoint",
    "MetricsRegistry",
    "ProcessMetrics",
    "RequestMeter",
    "RequestMetrics",
    "VariantCollector",
]
