"""What is counted, with a clock of our own; and that the documents name what is scraped."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from blockserve.common.api.engine import (
    ChainReport,
    EngineReport,
    RequestTiming,
    SegmentBatches,
    SegmentReport,
    SizeHistogram,
)
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import ConfigurationError, QueueFullError, ServerStoppingError
from blockserve.common.metrics import (
    EngineCollector,
    MetricsEndpoint,
    MetricsRegistry,
    RequestMetrics,
    VariantCollector,
)
from blockserve.common.metrics.catalogue import CATALOGUE
from blockserve.common.metrics.cluster_catalogue import CONTROLLER, ROUTER, WORKER
from blockserve.common.metrics.labels import OTHER, BoundedLabels
from blockserve.common.metrics.variants import LISTING_SECONDS
from blockzoo.errors import StorageError
from blockzoo.manifest import ChainId
from support.paths import ROOT

SIZES = SizeHistogram((1, 2, 4), (3, 0, 2, 1), 19)


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(**changes: Any) -> EngineReport:
    segments = tuple(SegmentReport(name, i, 2, 3, 6, 19, 8, 4, 5, 2) for i, name in enumerate("abc"))
    batches = tuple(SegmentBatches(one.segment_id, SIZES, SIZES, SIZES) for one in segments)
    chains = (ChainReport(ChainId("c1"), 0, 1, 2), ChainReport(ChainId("c2"), 0, 1, 2))
    made = EngineReport(
        "cpu",
        3,
        2,
        7,
        100,
        25,
        4096,
        1234,
        0.5,
        chains,
        segments,
        batches=batches,
        chain_loads=5,
        chain_unloads=3,
        kv_pages_cached=12,
        prefix_queried_tokens=90,
        prefix_hit_tokens=60,
        preemptions=8,
        chain_evictions=1,
    )
    return replace(made, **changes)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


# ---- requests


def test_a_request_is_counted_token_by_token() -> None:
    registry, clock = MetricsRegistry(), Clock()
    metrics = RequestMetrics(registry, clock=clock)
    with metrics.request(arrival=99.0) as meter:
        meter.resolve("kjv", prompt_tokens=5)
        assert value(registry, "blockzoo_variant_requests", model_name="kjv") == 1
        answer = meter.answer()
        answer.advance(1, RequestTiming(10.0, 10.4), None)
        clock.now = 102.0
        answer.advance(5, RequestTiming(10.0, 10.4), None)
        answer.advance(5, RequestTiming(10.0, 10.4), None)
        clock.now = 103.0
        answer.advance(6, RequestTiming(10.0, 10.4), FinishReason.STOP)
        clock.now = 200.0  # the caller reads the last chunk late
    found = {
        "vllm:time_to_first_token_seconds_sum": 1.0,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:request_queue_time_seconds_sum": pytest.approx(0.4),
        "vllm:inter_token_latency_seconds_count": 5,
        "vllm:inter_token_latency_seconds_sum": 3.0,
        "vllm:e2e_request_latency_seconds_sum": 4.0,
        "vllm:prompt_tokens_total": 5,
        "vllm:generation_tokens_total": 6,
        "blockzoo_variant_requests": 0,
    }
    assert {name: value(registry, name, model_name="kjv") for name in found} == found
    assert value(registry, "vllm:inter_token_latency_seconds_bucket", model_name="kjv", le="0.5") == 4
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="stop") == 1
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="abort") is None


def test_an_answer_that_comes_at_once_has_no_time_between_its_tokens() -> None:
    registry, clock = MetricsRegistry(), Clock()
    with RequestMetrics(registry, clock=clock).request(arrival=90.0) as meter:
        meter.resolve("kjv", 1)
        meter.answer().advance(3, None, FinishReason.LENGTH)
    assert value(registry, "vllm:inter_token_latency_seconds_count", model_name="kjv") == 2
    assert value(registry, "vllm:inter_token_latency_seconds_sum", model_name="kjv") == 0
    assert value(registry, "vllm:request_queue_time_seconds_count", model_name="kjv") is None


def test_a_call_for_several_answers_is_one_request() -> None:
    registry, clock = MetricsRegistry(), Clock()
    with RequestMetrics(registry, clock=clock).request(arrival=99.0) as meter:
        meter.resolve("kjv", prompt_tokens=5)
        first, second = meter.answer(), meter.answer()
        first.advance(1, RequestTiming(0.0, 0.5), None)
        clock.now = 101.0
        second.advance(1, RequestTiming(0.0, 7.0), None)
        clock.now = 102.0
        first.advance(2, None, FinishReason.LENGTH)
        clock.now = 104.0
        second.advance(2, None, FinishReason.STOP)
    found = {
        "vllm:time_to_first_token_seconds_sum": 1.0,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:request_queue_time_seconds_sum": 0.5,
        # Each answer's tokens follow its own.
        "vllm:inter_token_latency_seconds_sum": 2.0 + 3.0,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_sum": 5.0,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:prompt_tokens_total": 5,
        "vllm:generation_tokens_total": 4,
    }
    assert {name: value(registry, name, model_name="kjv") for name in found} == found
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="length") == 1
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="stop") is None


def test_how_a_request_ends_decides_where_it_is_counted() -> None:
    registry = MetricsRegistry()
    metrics = RequestMetrics(registry, clock=Clock())

    def end(error: BaseException | None, *, tokens: int = 0, found: bool = True) -> None:
        with pytest.raises(BaseException) if error else _nothing(), metrics.request(0.0) as meter:
            if found:
                meter.resolve("kjv", 2)
            if tokens:
                meter.answer().advance(tokens, None, None)
            if error:
                raise error

    end(QueueFullError("full"))
    end(QueueFullError("full"), found=False)
    end(ValueError("a fault"))
    end(ServerStoppingError("cut off"), tokens=3)
    end(GeneratorExit(), tokens=3)
    end(GeneratorExit(), found=False)
    assert value(registry, "blockzoo_requests_refused_total", reason="QUEUE_FULL") == 2
    assert value(registry, "blockzoo_requests_refused_total", reason="INTERNAL") == 1
    assert value(registry, "blockzoo_requests_failed_total", reason="SERVER_STOPPING") == 1
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="abort") == 1
    assert value(registry, "blockzoo_variant_requests", model_name="kjv") == 0
    # Only requests with a first token count their prompt.
    assert value(registry, "vllm:prompt_tokens_total", model_name="kjv") == 4


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_a_caller_who_leaves_with_the_last_token_has_had_the_whole_answer() -> None:
    registry = MetricsRegistry()
    with suppress(GeneratorExit), RequestMetrics(registry, clock=Clock()).request(0.0) as meter:
        meter.resolve("kjv", 2)
        meter.answer().advance(1, None, FinishReason.LENGTH)
        raise GeneratorExit
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="length") == 1
    assert value(registry, "vllm:request_success_total", model_name="kjv", finished_reason="abort") is None


# ---- labels


def test_the_thousand_and_first_variant_is_other() -> None:
    registry = MetricsRegistry()
    metrics = RequestMetrics(registry, clock=Clock())
    for i in [*range(1005), 0, 1004]:
        with metrics.request(0.0) as meter:
            meter.resolve(f"v{i}", 1)
            meter.answer().advance(1, None, FinishReason.LENGTH)
    (family,) = (one for one in registry.collect() if one.name == "vllm:generation_tokens")
    counts = {sample.labels["model_name"]: sample.value for sample in family.samples}
    assert len(counts) == 1001
    assert (counts["v0"], counts["v999"], counts[OTHER]) == (2, 1, 6)


def test_names_that_are_gone_make_room() -> None:
    labels = BoundedLabels(2)
    assert [labels.of(name) for name in "abca"] == ["a", "b", OTHER, "a"]
    labels.retain("bc")
    assert [labels.of(name) for name in "bca"] == ["b", "c", OTHER]
    assert BoundedLabels(0).of("a") == OTHER


# ---- the engine's report


def test_the_engines_report_is_translated_number_by_number() -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(report, model_name="fleet"))
    whole = {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.25,
        "num_preemptions_total": 8,
        "prefix_cache_queries_total": 90,
        "prefix_cache_hits_total": 60,
    }
    for name, expected in whole.items():
        assert value(registry, f"vllm:{name}", model_name="fleet") == expected
    plain = {
        "loaded_chains": 2,
        "chain_loads_total": 5,
        "chain_unloads_total": 3,
        "block_bytes": 1234,
        "kv_pages": 100,
        "kv_pages_used": 25,
        "kv_pages_cached": 12,
        "chain_evictions_total": 1,
        "kv_bytes": 4096,
        "engine_passes_total": 7,
        "engine_seconds_since_progress": 0.5,
    }
    assert {name: value(registry, f"blockzoo_{name}") for name in plain} == plain
    segment = {"forward_calls_total": 6, "mixed_calls_total": 4, "chains": 3}
    assert {name: value(registry, f"blockzoo_segment_{name}", segment="b") for name in segment} == segment
    for what in ("sequences", "tokens", "chains"):
        name = f"blockzoo_segment_batch_{what}"
        found = [
            value(registry, f"{name}_bucket", segment="a", le=le) for le in ("1.0", "2.0", "4.0", "+Inf")
        ]
        assert found == [3, 3, 5, 6]
        assert value(registry, f"{name}_sum", segment="a") == 19
        assert value(registry, f"{name}_count", segment="a") == 6


def test_an_engine_without_pages_uses_none_of_them() -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: report(kv_pages_total=0, kv_pages_used=0)))
    assert value(registry, "vllm:kv_cache_usage_perc", model_name="blockzoo") == 0


def test_segments_beyond_the_bound_are_added_up() -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector(report, max_labels=1))
    assert value(registry, "blockzoo_segment_forward_calls_total", segment="a") == 6
    assert value(registry, "blockzoo_segment_forward_calls_total", segment=OTHER) == 12
    assert value(registry, "blockzoo_segment_batch_tokens_bucket", segment=OTHER, le="4.0") == 10
    assert value(registry, "blockzoo_segment_batch_tokens_sum", segment=OTHER) == 38


# ---- variants


def variants(**chains: str) -> list[Any]:
    return [SimpleNamespace(name=name, chain=chain) for name, chain in chains.items()]


def test_variants_are_counted_and_the_zoo_is_not_asked_at_every_scrape() -> None:
    listings: list[list[Any]] = [variants(a="c1", b="c1", c="c2", d="c9"), variants(a="c1")]
    registry, clock, reads = CollectorRegistry(), Clock(), iter(listings)
    registry.register(VariantCollector(lambda: next(reads), report, BoundedLabels(2), clock=clock))
    for _ in range(3):
        assert value(registry, "blockzoo_registered_variants") == 4
        assert value(registry, "blockzoo_loaded_variants") == 3
        assert value(registry, "blockzoo_variant_loaded", model_name="a") == 1
        assert value(registry, "blockzoo_variant_loaded", model_name=OTHER) == 1
        assert value(registry, "blockzoo_variant_loaded", model_name="d") is None
    clock.now += LISTING_SECONDS
    assert value(registry, "blockzoo_registered_variants") == 1


def test_a_zoo_that_cannot_be_read_takes_no_other_metric_away(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> list[Any]:
        raise StorageError("the disk is gone")

    registry = CollectorRegistry()
    registry.register(VariantCollector(fail, report, BoundedLabels(2)))
    registry.register(EngineCollector(report))
    assert value(registry, "blockzoo_registered_variants") is None
    assert value(registry, "blockzoo_loaded_chains") == 2
    assert "the disk is gone" in caplog.text


# ---- the endpoint and the documents


def everything() -> MetricsRegistry:
    """A registry in which every metric has a value."""
    registry = MetricsRegistry()
    metrics = RequestMetrics(registry, clock=Clock())
    registry.register(EngineCollector(report))
    registry.register(VariantCollector(lambda: variants(a="c1"), report, metrics.labels))
    with metrics.request(0.0) as meter:
        meter.resolve("a", 1)
        meter.answer().advance(2, RequestTiming(0.0, 1.0), FinishReason.STOP)
    for tokens in (0, 1):
        with suppress(QueueFullError), metrics.request(0.0) as meter:
            meter.resolve("a", 1)
            meter.answer().advance(tokens, None, None)
            raise QueueFullError("full")
    metrics.substituted.labels("a").inc()
    return registry


def scrape(address: str) -> str:
    with urlopen(f"http://{address}/metrics", timeout=30) as response:
        return response.read().decode()


def test_what_is_scraped_is_what_the_catalogue_says() -> None:
    endpoint = MetricsEndpoint("127.0.0.1:0", everything())
    text = scrape(endpoint.address)
    endpoint.close()
    catalogue = {metric.name.removesuffix("_total"): metric for metric in CATALOGUE}
    assert len(catalogue) == len(CATALOGUE)
    seen = set()
    for family in text_string_to_metric_families(text):
        if family.name.startswith("process_"):
            continue
        seen.add(family.name)
        metric = catalogue[family.name]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        assert labels == {frozenset(metric.labels)}
        if metric.buckets:
            borders = {float(one.labels["le"]) for one in family.samples if "le" in one.labels}
            assert borders == {*metric.buckets, float("inf")}
    assert seen == set(catalogue)
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text


PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "text/plain;version=1.0.0", "*/*"])
def test_names_keep_their_colon_whatever_format_is_asked_for(accept: str) -> None:
    endpoint = MetricsEndpoint("127.0.0.1:0", everything())
    request = Request(f"http://{endpoint.address}/metrics", headers={"Accept": accept})
    with urlopen(request, timeout=30) as answer:
        text, kind = answer.read().decode(), answer.headers["Content-Type"]
    endpoint.close()
    assert kind.startswith("text/plain; version=0.0.4")
    samples = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if line[0] != "#"}
    assert "vllm:num_requests_waiting" in samples
    assert not any(name.startswith("vllm_") for name in samples)


def test_two_servers_in_one_process_do_not_share_metrics() -> None:
    first, second = MetricsRegistry(), MetricsRegistry()
    RequestMetrics(first)
    metrics = RequestMetrics(second, clock=Clock())
    with metrics.request(0.0) as meter:
        meter.resolve("a", 1)
        meter.answer().advance(1, None, FinishReason.STOP)
    assert value(first, "vllm:generation_tokens_total", model_name="a") is None
    assert value(second, "vllm:generation_tokens_total", model_name="a") == 1


def test_an_address_that_is_taken_is_told() -> None:
    endpoint = MetricsEndpoint("127.0.0.1:0", MetricsRegistry())
    with pytest.raises(ConfigurationError, match="metrics cannot listen") as caught:
        MetricsEndpoint(endpoint.address, MetricsRegistry())
    assert "--metrics-listen" in caught.value.hint
    endpoint.close()
    MetricsEndpoint(endpoint.address, MetricsRegistry()).close()


def test_the_document_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("metrics_docs", ROOT / "scripts" / "metrics_docs.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written, mark, made = (ROOT / "docs" / "metrics.md").read_text().partition(script.MARK)
    assert mark
    assert made == f"\n{script.render()}\n"
    # What people wrote names only metrics that there are.
    names = {metric.name for metric in (*CATALOGUE, *ROUTER, *WORKER, *CONTROLLER)}
    for name in re.findall(r"(?:vllm:|blockzoo_)\w+", written.replace("blockzoo.", "")):
        assert (
            name in names or name.removesuffix("_sum").removesuffix("_count").removesuffix("_bucket") in names
        )
