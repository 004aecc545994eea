"""What workers measured survives the wire."""

from __future__ import annotations

from blockserve.common.api.cluster import Run
from blockserve.common.api.spans import PhaseTimes, SpanTimes, SpanTrace, as_paths
from blockserve.common.wire.spans import span_from_message, span_to_message

TIMES = SpanTimes(
    queued=0.5,
    opening=0.25,
    attempts=3,
    cached=16,
    prompt=PhaseTimes(2, 40, 0.125, 0.0625, 0.5, 1.5, 1),
    decode=PhaseTimes(9, 9, 1.25, 0.75, 0.375, 2.5, 8),
    running=True,
)


def test_spans_survive_the_wire() -> None:
    span = SpanTrace("request#1", 2, 1, Run(3, 7), TIMES)
    assert span_from_message(span_to_message(span)) == span


def test_the_sums_of_a_span() -> None:
    assert TIMES.prompt.here == 0.625
    assert TIMES.decode.seconds_per_token == 1.25 / 9
    assert SpanTimes().decode.seconds_per_token == 0.0
    assert TIMES.seconds == 0.5 + 0.25 + (0.125 + 0.5 + 1.5) + (1.25 + 0.375 + 2.5)


def test_a_process_that_serves_alone_is_a_path_of_one_step() -> None:
    paths = as_paths([SpanTrace("a", 0, 0, Run(0, 7), TIMES), SpanTrace("b", 0, 0, Run(0, 7), SpanTimes())])
    assert list(paths) == ["a", "b"]
    (path,) = paths["a"]
    assert path.running == TIMES.seconds
    assert [(step.worker, step.run, step.times) for step in path.steps] == [("", Run(0, 7), TIMES)]
