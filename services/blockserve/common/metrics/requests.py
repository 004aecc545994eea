"""Counting requests at the edge, where their variant's name is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Self, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from blockserve.common.api.engine import RequestTiming
from blockserve.common.api.tokens import FinishReason
from blockserve.common.metrics import catalogue
from blockserve.common.metrics.catalogue import Metric
from blockserve.common.metrics.labels import BoundedLabels
from blockzoo.errors import BlockzooError

SomeMetric = TypeVar("SomeMetric", bound=MetricWrapperBase)

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
        self.substituted = counter(catalogue.SUBSTITUTED)
        info = catalogue.VARIANT_REQUESTS
        self.in_progress = Gauge(info.name, info.meaning, info.labels, registry=registry)
        self._series: dict[tuple[MetricWrapperBase, str], MetricWrapperBase] = {}

    def series(self, metric: SomeMetric, label: str) -> SomeMetric:
        """`metric.labels(label)`, which takes as long as counting, looked up once for good."""
        series = self._series.get((metric, label))
        if series is None:
            series = self._series[metric, label] = metric.labels(label)
        return cast("SomeMetric", series)

    def request(self, arrival: float) -> RequestMeter:
        """A meter for a call that came in at `arrival`; to be used in a `with` block around all of it."""
        return RequestMeter(self, arrival)


class RequestMeter:
    """One call, counted when its `with` block ends: by the error that ends it, or by what it had reached.

    A call may ask for several answers; each has a meter of its own (`answer`), and the call is counted once.
    """

    def __init__(self, metrics: RequestMetrics, arrival: float) -> None:
        self.metrics = metrics
        self._arrival = arrival
        self._label: str | None = None
        self._prompt_tokens = 0
        self._answers: list[AnswerMeter] = []
        self._has_token = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        metrics, label, finish = self.metrics, self._label, self._finish
        if label is not None:
            metrics.series(metrics.in_progress, label).dec()
        if isinstance(error, Exception) and finish is None:
            reason = error.reason if isinstance(error, BlockzooError) else INTERNAL
            (metrics.failed if self._has_token else metrics.refused).labels(reason).inc()
        elif label is not None:
            # The rest are cancellations; a caller may leave as soon as it has the last token.
            metrics.success.labels(label, ABORT if finish is None else finish.value).inc()

    @property
    def _finish(self) -> FinishReason | None:
        """Why the call ended, once all its answers have: `length` if one of them was cut off by it."""
        reasons = [answer.finish for answer in self._answers]
        if not reasons or None in reasons:
            return None
        return FinishReason.LENGTH if FinishReason.LENGTH in reasons else reasons[0]

    def resolve(self, variant: str, prompt_tokens: int) -> None:
        """The call names this variant, and its prompt has so many tokens."""
        self._label = self.metrics.labels.of(variant)
        self._prompt_tokens = prompt_tokens
        self.metrics.series(self.metrics.in_progress, self._label).inc()

    def answer(self) -> AnswerMeter:
        """A meter for one answer to the call, which has been resolved."""
        assert self._label is not None
        made = AnswerMeter(self, self._label)
        self._answers.append(made)
        return made

    def note_first_token(self, label: str, now: float, timing: RequestTiming | None) -> None:
        """An answer has its first token; the call counts that of the first of them."""
        if self._has_token:
            return
        self._has_token = True
        metrics = self.metrics
        metrics.series(metrics.ttft, label).observe(now - self._arrival)
        metrics.series(metrics.prompt_tokens, label).inc(self._prompt_tokens)
        if timing is not None:
            metrics.series(metrics.queue_time, label).observe(timing.queued_seconds)

    def note_finished(self, label: str, now: float) -> None:
        """An answer has ended; the call has when it is the last one."""
        if self._finish is not None:
            self.metrics.series(self.metrics.e2e, label).observe(now - self._arrival)


class AnswerMeter:
    """One answer to a call.

    Attributes:
        finish: why it ended; None before it does.
    """

    def __init__(self, request: RequestMeter, label: str) -> None:
        self._request = request
        self._label = label
        self._count = 0
        self._last = 0.0
        self._tokens: Counter
        self._inter_token: Histogram
        self.finish: FinishReason | None = None

    def advance(self, num_tokens: int, timing: RequestTiming | None, finish: FinishReason | None) -> None:
        """Note where the answer is.

        Args:
            num_tokens: output tokens so far.
            timing: as the engine told it.
            finish: why the answer ended, once it has.
        """
        metrics, label, new = self._request.metrics, self._label, num_tokens - self._count
        now = metrics.clock()
        if new:
            if self._count == 0:
                self._tokens = metrics.series(metrics.generation_tokens, label)
                self._inter_token = metrics.series(metrics.inter_token, label)
            self._tokens.inc(new)
            if self._count == 0:
                self._request.note_first_token(label, now, timing)
                new -= 1
            # Tokens that came together share the time since the last ones; with the first, they took none.
            gap = (now - self._last) / new if self._count and new else 0.0
            for _ in range(new):
                self._inter_token.observe(gap)
            self._count, self._last = num_tokens, now
        if finish is not None and self.finish is None:
            self.finish = finish
            self._request.note_finished(label, now)


def _counter(registry: CollectorRegistry, info: Metric) -> Counter:
    return Counter(info.name.removesuffix("_total"), info.meaning, info.labels, registry=registry)


def _histogram(registry: CollectorRegistry, info: Metric) -> Histogram:
    return Histogram(info.name, info.meaning, info.labels, registry=registry, buckets=info.buckets)
