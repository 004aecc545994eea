"""Counting requests at the edge, where their variant's name is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from blockserve.common.engine_api import FinishReason, RequestTiming
from blockserve.common.metrics import catalogue
from blockserve.common.metrics.catalogue import Metric
from blockserve.common.metrics.labels import BoundedLabels
from blockzoo.errors import BlockzooError

INTERNAL = "INTERNAL"
"""Reason of an error that is no `BlockzooError`."""
ABORT = "abort"
"""Finished reason of an answer that its caller left."""


class RequestMetrics:
    """The metrics of all requests of one server."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_labels: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the metrics in `registry`.

        Args:
            registry: the server's own.
            max_labels: most variants with series of their own; the others share the label "other".
            clock: seconds, of the same clock as the arrivals that `request` is given.
        """
        self.clock = clock
        self.labels = BoundedLabels(max_labels)
        counter, histogram = partial(_counter, registry), partial(_histogram, registry)
        self.ttft = histogram(catalogue.TTFT)
        self.inter_token = histogram(catalogue.INTER_TOKEN)
        self.e2e = histogram(catalogue.E2E)
        self.queue_time = histogram(catalogue.QUEUE_TIME)
        self.prompt_tokens = counter(catalogue.PROMPT_TOKENS)
        self.generation_tokens = counter(catalogue.GENERATION_TOKENS)
        self.success = counter(catalogue.SUCCESS)
        self.refused = counter(catalogue.REFUSED)
        self.failed = counter(catalogue.FAILED)
        info = catalogue.VARIANT_REQUESTS
        self.in_progress = Gauge(info.name, info.meaning, info.labels, registry=registry)

    def request(self, arrival: float) -> RequestMeter:
        """A meter for a call that came in at `arrival`; to be used in a `with` block around all of it."""
        return RequestMeter(self, arrival)


class RequestMeter:
    """One call, counted when its `with` block ends: by the error that ends it, or by what it had reached."""

    def __init__(self, metrics: RequestMetrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = self._last = arrival
        self._label: str | None = None
        self._prompt_tokens = 0
        self._count = 0
        self._finish: FinishReason | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        metrics, label = self._metrics, self._label
        if label is not None:
            metrics.in_progress.labels(label).dec()
        if isinstance(error, Exception) and self._finish is None:
            reason = error.reason if isinstance(error, BlockzooError) else INTERNAL
            (metrics.failed if self._count else metrics.refused).labels(reason).inc()
        elif label is not None:
            # The rest are cancellations; a caller may leave as soon as it has the last token.
            metrics.success.labels(label, ABORT if self._finish is None else self._finish.value).inc()

    def resolve(self, variant: str, prompt_tokens: int) -> None:
        """The call names this variant, and its prompt has so many tokens."""
        self._label = self._metrics.labels.of(variant)
        self._prompt_tokens = prompt_tokens
        self._metrics.in_progress.labels(self._label).inc()

    def advance(self, num_tokens: int, timing: RequestTiming | None, finish: FinishReason | None) -> None:
        """Note where the answer is.

        Args:
            num_tokens: output tokens so far.
            timing: as the engine told it.
            finish: why the answer ended, once it has.
        """
        metrics, label, new = self._metrics, self._label, num_tokens - self._count
        assert label is not None
        now = metrics.clock()
        if new:
            metrics.generation_tokens.labels(label).inc(new)
            if self._count == 0:
                self._note_first(label, now, timing)
                new -= 1
            # Tokens that came together share the time since the last ones; with the first, they took none.
            gap = (now - self._last) / new if self._count and new else 0.0
            inter_token = metrics.inter_token.labels(label)
            for _ in range(new):
                inter_token.observe(gap)
            self._count, self._last = num_tokens, now
        if finish is not None and self._finish is None:
            self._finish = finish
            metrics.e2e.labels(label).observe(now - self._arrival)

    def _note_first(self, label: str, now: float, timing: RequestTiming | None) -> None:
        metrics = self._metrics
        metrics.ttft.labels(label).observe(now - self._arrival)
        metrics.prompt_tokens.labels(label).inc(self._prompt_tokens)
        if timing is not None:
            metrics.queue_time.labels(label).observe(timing.queued_seconds)


def _counter(registry: CollectorRegistry, info: Metric) -> Counter:
    return Counter(info.name.removesuffix("_total"), info.meaning, info.labels, registry=registry)


def _histogram(registry: CollectorRegistry, info: Metric) -> Histogram:
    return Histogram(info.name, info.meaning, info.labels, registry=registry, buckets=info.buckets)
