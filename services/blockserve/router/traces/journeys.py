"""The paths of this router's requests: which workers, for how long, and why a request went on elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from blockserve.common.api.cluster import ClusterView, PathStep, WorkerId
from blockserve.common.api.spans import PathTrace, SpanTimes, StepTrace
from blockserve.common.tracing.recent import Recent

SpanKey = tuple[WorkerId, str, int, int]
"""Worker, request, epoch of the path, place on it."""
NamedStep = tuple[PathStep, str]
"""A worker on a path, and its name for people."""


class Leg:
    """A request along one path.

    Attributes:
        epoch: number of the path.
        steps: its workers; empty while it is being chosen.
        moved: what was decided about keys and values.
        ended: why the request left the path; empty when it ended on it.
        end: when it left the path; None before that.
    """

    def __init__(self, epoch: int, clock: Callable[[], float], begun: float) -> None:
        """A path is being chosen since `begun`."""
        self.epoch = epoch
        self.steps: tuple[NamedStep, ...] = ()
        self.moved = self.ended = ""
        self._clock = clock
        self._begun = begun
        self.end: float | None = None
        self._chosen: float | None = None
        self._sent: float | None = None

    def choose(self, path: Sequence[PathStep], view: ClusterView) -> None:
        """It has been chosen."""
        self._chosen = self._clock()
        self.steps = tuple((step, _name(step.worker, view)) for step in path)

    def send(self, moved: str = "") -> None:
        """The request is sent to the first worker, with this decision about keys and values."""
        self.moved = moved
        self._sent = self._clock()

    def finish(self, reason: str = "") -> None:
        """The request has left the path; what is said first counts."""
        if self.end is None:
            self.end, self.ended = self._clock(), reason

    def trace(
        self, request_id: str, spans: Mapping[SpanKey, SpanTimes], view: ClusterView, now: float
    ) -> PathTrace:
        """Everything known of it."""
        end = now if self.end is None else self.end
        chosen = end if self._chosen is None else self._chosen
        sent = end if self._sent is None else self._sent
        following = [*self.steps[1:], *self.steps[:1]]
        steps = tuple(
            StepTrace(
                step.worker,
                name,
                step.run,
                spans.get((step.worker, request_id, self.epoch, place)),
                _hop(step.worker, onward.worker, view),
            )
            for place, ((step, name), (onward, _)) in enumerate(zip(self.steps, following, strict=True))
        )
        return PathTrace(
            self.epoch, steps, chosen - self._begun, sent - chosen, self.moved, end - sent, self.ended
        )


class Journey:
    """All paths of one request."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """A request has come."""
        self._clock = clock
        self._begun = clock()
        self.legs: list[Leg] = []

    def begin(self, epoch: int) -> Leg:
        """Another path is to be chosen; pauses since the last one count as choosing."""
        before = self.legs[-1].end if self.legs else None
        leg = Leg(epoch, self._clock, self._begun if before is None else before)
        self.legs.append(leg)
        return leg


class Journeys:
    """The journeys of running requests, and of those that have lately ended."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember `limit` ended ones at most."""
        self._clock = clock
        self._recent: Recent[str, Journey] = Recent(limit)

    @contextmanager
    def follow(self, request_id: str) -> Iterator[Journey]:
        """One request from its beginning to its end; one that comes again goes on with its journey."""
        journey = self._recent.get(request_id) or Journey(self._clock)
        self._recent.begin(request_id, journey)
        try:
            yield journey
        finally:
            if journey.legs:
                journey.legs[-1].finish()
            self._recent.end(request_id)

    def workers(self, request_ids: Sequence[str]) -> dict[WorkerId, str]:
        """The workers on all paths of these requests, with their addresses."""
        journeys = (self._recent.get(name) for name in request_ids)
        return {
            step.worker: step.address
            for journey in journeys
            if journey is not None
            for leg in journey.legs
            for step, _ in leg.steps
        }

    def trace(
        self, request_ids: Sequence[str], spans: Mapping[SpanKey, SpanTimes], view: ClusterView
    ) -> dict[str, tuple[PathTrace, ...]]:
        """The paths of those requests that are remembered, with what workers measured of them."""
        now = self._clock()
        return {
            name: tuple(leg.trace(name, spans, view, now) for leg in journey.legs)
            for name in request_ids
            if (journey := self._recent.get(name)) is not None
        }

    def running(self) -> Counter[tuple[NamedStep, ...]]:
        """How many requests run along each path now."""
        legs = (journey.legs[-1] for journey in self._recent.running() if journey.legs)
        return Counter(leg.steps for leg in legs if leg.steps and leg.end is None)


def _name(worker: WorkerId, view: ClusterView) -> str:
    known = view.workers.get(worker)
    return worker if known is None else known.record.name


def _hop(worker: WorkerId, onward: WorkerId, view: ClusterView) -> float:
    known = view.workers.get(worker)
    return 0.0 if known is None else known.load.hop_seconds.get(onward, 0.0)
