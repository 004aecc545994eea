"""Where a request's time went: what each process measured of it. Frozen values, no I/O.

Only durations travel, each measured by one process with its own clock, so the clocks of two hosts are never
compared. A request has one path after another when workers are lost; each path has an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from blockserve.common.api.cluster import Run, WorkerId


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """What one worker did for a request's prompt, or for the tokens after it.

    Attributes:
        passes: passes that computed for the request.
        tokens: its tokens in them.
        seconds: of these passes, all of each: a request waits for the whole batch that it is in.
        longest: the longest of them, in seconds.
        waited: seconds in which it could have been computed on, until a pass of this worker began.
        away: at the head worker of a path: seconds from handing hidden states on to having the token.
        round_trips: how often that was.
    """

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    waited: float = 0.0
    away: float = 0.0
    round_trips: int = 0

    @property
    def here(self) -> float:
        """Seconds in which the request was at this worker."""
        return self.seconds + self.waited

    @property
    def seconds_per_token(self) -> float:
        """Mean; 0 without tokens."""
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class SpanTimes:
    """What one worker measured of a request along one path.

    Attributes:
        queued: seconds until it had pages, or its first pass; again after it had to give them up.
        opening: at the head worker: seconds in which the other workers were asked for pages.
        attempts: how often it was begun here: pages given up, or refused elsewhere, are asked for again.
        cached: prompt tokens that the prefix cache spared.
        prompt: computing the tokens it came with; after a lost worker, those of the answer so far too.
        decode: computing one token after another.
        running: whether it had not ended.
    """

    queued: float = 0.0
    opening: float = 0.0
    attempts: int = 1
    cached: int = 0
    prompt: PhaseTimes = PhaseTimes()
    decode: PhaseTimes = PhaseTimes()
    running: bool = False

    @property
    def seconds(self) -> float:
        """All of it; at the head worker the whole time from when the request came to its end."""
        phases = self.prompt.here + self.prompt.away + self.decode.here + self.decode.away
        return self.queued + self.opening + phases


@dataclass(frozen=True, slots=True)
class SpanTrace:
    """`SpanTimes` with what they are about.

    Attributes:
        request_id: of the engine's request.
        epoch: of the path.
        place: index of the worker on it.
        run: positions of the chain that it executes.
        times: what it measured.
    """

    request_id: str
    epoch: int
    place: int
    run: Run
    times: SpanTimes


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One worker on a path.

    Attributes:
        worker: which life of which worker; empty where one process serves alone.
        name: for people.
        run: positions of the chain that it executes.
        times: what it measured; None when it could not be asked or has forgotten.
        hop_seconds: one way from here to the next worker, and from the last to the first, as small calls
            measure it; 0 when not known.
    """

    worker: WorkerId
    name: str
    run: Run
    times: SpanTimes | None = None
    hop_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PathTrace:
    """A request along one path, by the router's clock.

    Attributes:
        epoch: number of the path.
        steps: its workers, head worker first; empty while it is being chosen.
        choosing: seconds in which it was chosen and waited for, pauses after a failure included.
        moving: seconds in which keys and values were fetched from the path before.
        moved: what was decided about them, and why; empty when there was nothing to decide.
        running: seconds from sending the request to its end there.
        ended: why the request left the path; empty when it ended on it or runs there.
    """

    epoch: int
    steps: tuple[StepTrace, ...] = ()
    choosing: float = 0.0
    moving: float = 0.0
    moved: str = ""
    running: float = 0.0
    ended: str = ""


@runtime_checkable
class TracesRequests(Protocol):
    """An engine that remembers where the time of its requests went."""

    async def trace(self, request_ids: Sequence[str]) -> Mapping[str, tuple[PathTrace, ...]]:
        """The paths of requests, in order; a request that it does not remember is left out."""
        ...


def as_paths(spans: Sequence[SpanTrace]) -> dict[str, tuple[PathTrace, ...]]:
    """Spans of requests that one process executes alone, as paths of one step."""
    found: dict[str, tuple[PathTrace, ...]] = {}
    for span in spans:
        step = StepTrace(WorkerId(""), "", span.run, span.times)
        path = PathTrace(span.epoch, (step,), running=span.times.seconds)
        found[span.request_id] = (*found.get(span.request_id, ()), path)
    return found
