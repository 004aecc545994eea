"""The clocks of requests that this worker executes, or has lately executed. In the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from blockserve.common.api.cluster import Run
from blockserve.common.api.spans import SpanTrace
from blockserve.common.tracing.recent import Recent
from blockserve.worker.requests.clock import AWAY, IDLE, READY, SpanClock, State
from blockserve.worker.requests.running import Chunk, RunningRequest

Key = tuple[str, int, int]
"""Request, epoch of its path, place of this worker on it."""


class SpanTraces:
    """Clocks by request and path; those of ended requests up to a bound."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember `limit` ended spans at most."""
        self._clock = clock
        self._recent: Recent[Key, tuple[Run, SpanClock]] = Recent(limit)

    def begin(self, running: RunningRequest) -> None:
        """A request is taken in; a span that is opened again along the same path goes on with its clock."""
        now, key = self._clock(), _key(running)
        known = self._recent.get(key)
        if known is not None:
            running.clock = known[1]
            running.clock.begin_again(now)
        if running.is_follower:  # who began it waits for its pages, and is the one to count that
            running.clock.enter(State.IDLE, now)
        self._recent.begin(key, (running.chain.span.run, running.clock))

    def computed(self, chunks: Sequence[Chunk], start: float, end: float) -> None:
        """A pass over these chunks has been made, and its tokens have been told to their requests."""
        for chunk in chunks:
            running, first, last = chunk.running, chunk.start, chunk.end
            request = running.request
            after = READY
            if running.place:
                if not running.inputs:
                    after = IDLE
            elif len(request.path) > 1 and last == running.num_tokens:
                after = AWAY
            is_prompt = last - first > 1 or first < len(request.prompt)
            running.clock.computed(last - first, is_prompt, start, end, after)
            if is_prompt:
                running.clock.cached = running.num_cached

    def end(self, running: RunningRequest) -> None:
        """A request is no longer executed here."""
        running.clock.enter(State.ENDED, self._clock())
        self._recent.end(_key(running))

    def of(self, request_ids: Collection[str]) -> list[SpanTrace]:
        """What is remembered of these requests, along all their paths, oldest first."""
        now, wanted = self._clock(), set(request_ids)
        return [
            SpanTrace(request_id, epoch, place, run, clock.times(now))
            for (request_id, epoch, place), (run, clock) in self._recent.items()
            if request_id in wanted
        ]


def _key(running: RunningRequest) -> Key:
    return running.request.request_id, running.request.epoch, running.place
