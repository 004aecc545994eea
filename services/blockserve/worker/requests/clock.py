"""Where the time of one request goes at this worker, as sums: nothing is kept for each token.

Whatever a request does, it is in one of a few states, and the time in a state is added up when it leaves it.
So at the head of a path the sums are all of its time there, whatever happens.
"""

from __future__ import annotations

import enum

from blockserve.common.api.spans import PhaseTimes, SpanTimes


class State(enum.Enum):
    """What a request waits for between two passes."""

    QUEUED = enum.auto()
    OPENING = enum.auto()
    READY = enum.auto()
    AWAY = enum.auto()
    IDLE = enum.auto()
    ENDED = enum.auto()


READY, AWAY, IDLE = State.READY, State.AWAY, State.IDLE
"""At hand where every pass looks at them."""


class PhaseClock:
    """The sums behind `PhaseTimes`."""

    __slots__ = ("away", "longest", "passes", "round_trips", "seconds", "tokens", "waited")

    def __init__(self) -> None:
        self.passes = self.tokens = self.round_trips = 0
        self.seconds = self.longest = self.waited = self.away = 0.0

    def times(self) -> PhaseTimes:
        """The sums as they are."""
        return PhaseTimes(
            self.passes, self.tokens, self.seconds, self.longest, self.waited, self.away, self.round_trips
        )


class SpanClock:
    """The sums behind `SpanTimes`. Times given are `time.monotonic()` values, never smaller than before.

    Attributes:
        state: of the request, since `since`.
        attempts: how often it was begun here.
        cached: prompt tokens that the prefix cache spared.
    """

    __slots__ = (
        "_decode",
        "_opening",
        "_phase",
        "_prompt",
        "_queued",
        "attempts",
        "cached",
        "since",
        "state",
    )

    def __init__(self, now: float) -> None:
        """A request has come."""
        self.state = State.QUEUED
        self.since = now
        self.attempts = 1
        self.cached = 0
        self._queued = self._opening = 0.0
        self._prompt, self._decode = PhaseClock(), PhaseClock()
        self._phase = self._prompt

    def enter(self, state: State, now: float) -> None:
        """The request waits for something else from now on; a state that goes on is counted up to now."""
        seconds = now - self.since
        if self.state is State.READY:
            self._phase.waited += seconds
        elif self.state is State.AWAY:
            self._phase.away += seconds
        elif self.state is State.QUEUED:
            self._queued += seconds
        elif self.state is State.OPENING:
            self._opening += seconds
        self.state, self.since = state, now

    def begin_again(self, now: float) -> None:
        """It has given its pages up, or not had any, and asks for them anew."""
        self.attempts += 1
        self.enter(State.QUEUED, now)

    def arrived(self, now: float) -> None:
        """Something to compute came while there was nothing."""
        if self.state is State.IDLE:
            self.enter(State.READY, now)

    def came_back(self, now: float) -> None:
        """The token that others computed is here."""
        if self.state is State.AWAY:
            self._phase.round_trips += 1
            self.enter(State.READY, now)

    def computed(self, tokens: int, is_prompt: bool, start: float, end: float, after: State) -> None:
        """A pass from `start` to `end` computed some of its tokens; `after` is what it waits for then.

        Called for every request of every pass.
        """
        phase = self._prompt if is_prompt else self._decode
        if self.state is READY:
            phase.waited += start - self.since
        else:
            self.enter(READY, start)
        seconds = end - start
        phase.passes += 1
        phase.tokens += tokens
        phase.seconds += seconds
        if seconds > phase.longest:
            phase.longest = seconds
        self._phase, self.state, self.since = phase, after, end

    def times(self, now: float) -> SpanTimes:
        """The sums up to now."""
        self.enter(self.state, now)
        return SpanTimes(
            queued=self._queued,
            opening=self._opening,
            attempts=self.attempts,
            cached=self.cached,
            prompt=self._prompt.times(),
            decode=self._decode.times(),
            running=self.state is not State.ENDED,
        )
