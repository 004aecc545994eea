"""Every metric: name, type, labels, meaning. docs/metrics.md is made from this list.

Names with the prefix `vllm:` mean what vLLM's metrics of that name mean, with its types, units and bucket
borders, so that dashboards and scalers made for it work here. The others are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Seconds to the first token."""
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Seconds between two tokens."""
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Seconds of a whole request, and of its time in the queue."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as it is scraped; a counter's ends in `_total`.
        kind: Prometheus type.
        labels: label names.
        meaning: one sentence, with the unit where the name does not say it.
        buckets: upper borders of a histogram measured here; the engine's own have those of the engine.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()


_VARIANT = ("model_name",)
_SEGMENT = ("segment",)

RUNNING = Metric("vllm:num_requests_running", "gauge", _VARIANT, "Requests in the batch, of all variants.")
WAITING = Metric("vllm:num_requests_waiting", "gauge", _VARIANT, "Requests in the queue, of all variants.")
KV_USAGE = Metric("vllm:kv_cache_usage_perc", "gauge", _VARIANT, "Share of the KV pages in use, 0 to 1.")
PREEMPTIONS = Metric(
    "vllm:num_preemptions_total",
    "counter",
    _VARIANT,
    "Times that a running request had to give up its KV pages and compute them again.",
)
PREFIX_QUERIES = Metric(
    "vllm:prefix_cache_queries_total", "counter", _VARIANT, "Prompt tokens looked up in the prefix cache."
)
PREFIX_HITS = Metric(
    "vllm:prefix_cache_hits_total", "counter", _VARIANT, "Prompt tokens found in the prefix cache."
)
TTFT = Metric(
    "vllm:time_to_first_token_seconds",
    "histogram",
    _VARIANT,
    "Time from the arrival of a request to its first token.",
    TTFT_BUCKETS,
)
INTER_TOKEN = Metric(
    "vllm:inter_token_latency_seconds",
    "histogram",
    _VARIANT,
    "Time between two tokens of an answer, as the router receives them; one value for each token but "
    "the first.",
    INTER_TOKEN_BUCKETS,
)
E2E = Metric(
    "vllm:e2e_request_latency_seconds",
    "histogram",
    _VARIANT,
    "Time from the arrival of a request to its last token.",
    REQUEST_BUCKETS,
)
QUEUE_TIME = Metric(
    "vllm:request_queue_time_seconds",
    "histogram",
    _VARIANT,
    "Time from entering the engine's queue to the first pass that computes for the request.",
    REQUEST_BUCKETS,
)
PROMPT_TOKENS = Metric(
    "vllm:prompt_tokens_total", "counter", _VARIANT, "Prompt tokens of requests that got a first token."
)
GENERATION_TOKENS = Metric("vllm:generation_tokens_total", "counter", _VARIANT, "Output tokens.")
SUBSTITUTED = Metric(
    "blockzoo_substituted_requests_total",
    "counter",
    _VARIANT,
    "Requests to the variant that an approved equivalent answered.",
)
SUCCESS = Metric(
    "vllm:request_success_total",
    "counter",
    ("model_name", "finished_reason"),
    "Requests that ended without an error, by reason: `stop`, `length`, or `abort` if the caller left.",
)
REFUSED = Metric(
    "blockzoo_requests_refused_total",
    "counter",
    ("reason",),
    "Generate calls that ended with an error before their first token, by the error's reason.",
)
FAILED = Metric(
    "blockzoo_requests_failed_total",
    "counter",
    ("reason",),
    "Generate calls that ended with an error after their first token, by the error's reason.",
)
VARIANT_REQUESTS = Metric(
    "blockzoo_variant_requests", "gauge", _VARIANT, "Requests to a variant that are in progress."
)
VARIANT_LOADED = Metric(
    "blockzoo_variant_loaded", "gauge", _VARIANT, "1 for each variant whose blocks are in memory."
)
REGISTERED = Metric(
    "blockzoo_registered_variants", "gauge", (), "Variants in the zoo; at most half a minute old."
)
LOADED = Metric(
    "blockzoo_loaded_variants", "gauge", (), "Number of registered variants whose blocks are in memory."
)
CHAINS = Metric("blockzoo_loaded_chains", "gauge", (), "Chains of blocks in memory.")
LOADS = Metric("blockzoo_chain_loads_total", "counter", (), "Chains that were loaded.")
UNLOADS = Metric("blockzoo_chain_unloads_total", "counter", (), "Chains that were unloaded.")
EVICTIONS = Metric(
    "blockzoo_chain_evictions_total", "counter", (), "Chains that were unloaded to make room for others."
)
BLOCK_BYTES = Metric(
    "blockzoo_block_bytes", "gauge", (), "Bytes of blocks in memory, in the layout that computes."
)
KV_PAGES = Metric("blockzoo_kv_pages", "gauge", (), "Number of KV pages.")
KV_PAGES_USED = Metric("blockzoo_kv_pages_used", "gauge", (), "KV pages that requests hold.")
KV_PAGES_CACHED = Metric(
    "blockzoo_kv_pages_cached",
    "gauge",
    (),
    "KV pages that only the prefix cache holds; requests take them when needed.",
)
KV_BYTES = Metric("blockzoo_kv_bytes", "gauge", (), "Bytes reserved for KV pages.")
PASSES = Metric("blockzoo_engine_passes_total", "counter", (), "Passes of the engine.")
PROGRESS = Metric(
    "blockzoo_engine_seconds_since_progress",
    "gauge",
    (),
    "Seconds since the engine last finished a pass; a large value means a stall only while requests wait.",
)
SEGMENT_CALLS = Metric(
    "blockzoo_segment_forward_calls_total",
    "counter",
    _SEGMENT,
    "Forward calls of the blocks of a segment, each over a whole batch.",
)
SEGMENT_MIXED = Metric(
    "blockzoo_segment_mixed_calls_total",
    "counter",
    _SEGMENT,
    "Forward calls whose batch held requests of more than one chain.",
)
SEGMENT_CHAINS = Metric("blockzoo_segment_chains", "gauge", _SEGMENT, "Loaded chains that use a segment.")
SEGMENT_SEQUENCES = Metric(
    "blockzoo_segment_batch_sequences", "histogram", _SEGMENT, "Requests in one forward call."
)
SEGMENT_TOKENS = Metric(
    "blockzoo_segment_batch_tokens",
    "histogram",
    _SEGMENT,
    "Tokens in one forward call; if the head is a segment of its own, its rows of logits.",
)
SEGMENT_BATCH_CHAINS = Metric(
    "blockzoo_segment_batch_chains", "histogram", _SEGMENT, "Different chains in one forward call."
)

CATALOGUE: tuple[Metric, ...] = (
    *(
        RUNNING,
        WAITING,
        KV_USAGE,
        PREEMPTIONS,
        PREFIX_QUERIES,
        PREFIX_HITS,
        TTFT,
        INTER_TOKEN,
        E2E,
        QUEUE_TIME,
    ),
    *(PROMPT_TOKENS, GENERATION_TOKENS, SUBSTITUTED, SUCCESS),
    *(REFUSED, FAILED, VARIANT_REQUESTS, VARIANT_LOADED, REGISTERED, LOADED),
    *(CHAINS, LOADS, UNLOADS, EVICTIONS, BLOCK_BYTES),
    *(KV_PAGES, KV_PAGES_USED, KV_PAGES_CACHED, KV_BYTES, PASSES, PROGRESS),
    *(SEGMENT_CALLS, SEGMENT_MIXED, SEGMENT_CHAINS),
    *(SEGMENT_SEQUENCES, SEGMENT_TOKENS, SEGMENT_BATCH_CHAINS),
)
"""In the order of the documentation."""
