"""The engine's report as metrics, translated anew at every scrape: serving pays nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from blockserve.common.api.engine import EngineReport, SegmentReport, SizeHistogram
from blockserve.common.metrics import catalogue
from blockserve.common.metrics.catalogue import Metric
from blockserve.common.metrics.labels import BoundedLabels

Values = Mapping[tuple[str, ...], float]
"""Label values and what they count."""


class EngineCollector(Collector):
    """Asks the engine when somebody asks us. Runs in the thread that answers the scrape."""

    def __init__(
        self, report: Callable[[], EngineReport], *, model_name: str = "blockzoo", max_labels: int = 1000
    ) -> None:
        """Make a collector.

        Args:
            report: the engine's.
            model_name: label of the metrics that are about the engine and no single variant.
            max_labels: most segments with series of their own; the others are added up as "other".
        """
        self._report = report
        self._model_name = (model_name,)
        self._segments = BoundedLabels(max_labels)

    def collect(self) -> Iterable[Family]:
        """All families of the engine."""
        report = self._report()
        yield from self._whole(report)
        yield from self._by_segment(report)

    def describe(self) -> Iterable[Family]:
        """Nothing: registering does not ask the engine."""
        return ()

    def _whole(self, report: EngineReport) -> Iterable[Family]:
        usage = report.kv_pages_used / report.kv_pages_total if report.kv_pages_total else 0.0
        shared = (
            (catalogue.RUNNING, report.running_requests),
            (catalogue.WAITING, report.waiting_requests),
            (catalogue.KV_USAGE, usage),
            (catalogue.PREEMPTIONS, report.preemptions),
            (catalogue.PREFIX_QUERIES, report.prefix_queried_tokens),
            (catalogue.PREFIX_HITS, report.prefix_hit_tokens),
        )
        for info, value in shared:
            yield family(info, {self._model_name: value})
        plain = (
            (catalogue.CHAINS, len(report.chains)),
            (catalogue.LOADS, report.chain_loads),
            (catalogue.UNLOADS, report.chain_unloads),
            (catalogue.EVICTIONS, report.chain_evictions),
            (catalogue.BLOCK_BYTES, report.block_bytes),
            (catalogue.KV_PAGES, report.kv_pages_total),
            (catalogue.KV_PAGES_USED, report.kv_pages_used),
            (catalogue.KV_PAGES_CACHED, report.kv_pages_cached),
            (catalogue.KV_BYTES, report.kv_bytes_total),
            (catalogue.PASSES, report.passes),
            (catalogue.PROGRESS, report.seconds_since_progress),
        )
        for info, value in plain:
            yield family(info, {(): value})

    def _by_segment(self, report: EngineReport) -> Iterable[Family]:
        self._segments.retain(segment.segment_id for segment in report.segments)
        labels = {one.segment_id: self._segments.of(one.segment_id) for one in report.segments}
        numbers: tuple[tuple[Metric, Callable[[SegmentReport], int]], ...] = (
            (catalogue.SEGMENT_CALLS, lambda one: one.forward_calls),
            (catalogue.SEGMENT_MIXED, lambda one: one.mixed_calls),
            (catalogue.SEGMENT_CHAINS, lambda one: one.num_chains),
        )
        for info, number in numbers:
            sums: dict[tuple[str, ...], float] = {}
            for one in report.segments:
                label = (labels[one.segment_id],)
                sums[label] = sums.get(label, 0) + number(one)
            yield family(info, sums)
        sizes = (
            (catalogue.SEGMENT_SEQUENCES, [(one.segment_id, one.sequences) for one in report.batches]),
            (catalogue.SEGMENT_TOKENS, [(one.segment_id, one.tokens) for one in report.batches]),
            (catalogue.SEGMENT_BATCH_CHAINS, [(one.segment_id, one.chains) for one in report.batches]),
        )
        for info, histograms in sizes:
            merged: dict[tuple[str, ...], SizeHistogram] = {}
            for segment, histogram in histograms:
                shown = (labels[segment],)
                merged[shown] = merged[shown] + histogram if shown in merged else histogram
            yield histogram_family(info, merged)


def family(info: Metric, values: Values) -> Family:
    """A counter or a gauge with these values."""
    kind = GaugeMetricFamily if info.kind == "gauge" else CounterMetricFamily
    made = kind(info.name, info.meaning, labels=info.labels)
    for labels, value in values.items():
        made.add_metric(labels, value)
    return made


def histogram_family(info: Metric, values: Mapping[tuple[str, ...], SizeHistogram]) -> Family:
    """A histogram with these values, by label values."""
    made = HistogramMetricFamily(info.name, info.meaning, labels=info.labels)
    for labels, histogram in values.items():
        made.add_metric(labels, _buckets(histogram), histogram.total)
    return made


def _buckets(histogram: SizeHistogram) -> Sequence[tuple[str, float]]:
    """Upper border and how many sizes are at most that, as Prometheus wants it."""
    borders = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(borders, accumulate(histogram.counts), strict=True))
