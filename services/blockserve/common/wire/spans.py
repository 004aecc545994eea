"""What workers measured of requests, to messages and back; pure. See `blockserve.common.api.spans`."""

from __future__ import annotations

from blockproto.v1 import trace_pb2
from blockserve.common.api.cluster import Run
from blockserve.common.api.spans import PhaseTimes, SpanTimes, SpanTrace


def span_to_message(span: SpanTrace) -> trace_pb2.SpanTrace:
    """A span for the wire."""
    return trace_pb2.SpanTrace(
        request_id=span.request_id,
        epoch=span.epoch,
        place=span.place,
        first=span.run.first,
        end=span.run.end,
        times=times_to_message(span.times),
    )


def span_from_message(message: trace_pb2.SpanTrace) -> SpanTrace:
    """The inverse of `span_to_message`."""
    return SpanTrace(
        request_id=message.request_id,
        epoch=message.epoch,
        place=message.place,
        run=Run(message.first, message.end),
        times=times_from_message(message.times),
    )


def times_to_message(times: SpanTimes) -> trace_pb2.SpanTimes:
    """What a worker measured, for the wire."""
    return trace_pb2.SpanTimes(
        queued_seconds=times.queued,
        opening_seconds=times.opening,
        attempts=times.attempts,
        cached_tokens=times.cached,
        prompt=_phase_to_message(times.prompt),
        decode=_phase_to_message(times.decode),
        running=times.running,
    )


def times_from_message(message: trace_pb2.SpanTimes) -> SpanTimes:
    """The inverse of `times_to_message`."""
    return SpanTimes(
        queued=message.queued_seconds,
        opening=message.opening_seconds,
        attempts=message.attempts,
        cached=message.cached_tokens,
        prompt=_phase_from_message(message.prompt),
        decode=_phase_from_message(message.decode),
        running=message.running,
    )


def _phase_to_message(phase: PhaseTimes) -> trace_pb2.PhaseTimes:
    return trace_pb2.PhaseTimes(
        passes=phase.passes,
        tokens=phase.tokens,
        seconds=phase.seconds,
        longest_seconds=phase.longest,
        waited_seconds=phase.waited,
        away_seconds=phase.away,
        round_trips=phase.round_trips,
    )


def _phase_from_message(message: trace_pb2.PhaseTimes) -> PhaseTimes:
    return PhaseTimes(
        passes=message.passes,
        tokens=message.tokens,
        seconds=message.seconds,
        longest=message.longest_seconds,
        waited=message.waited_seconds,
        away=message.away_seconds,
        round_trips=message.round_trips,
    )
