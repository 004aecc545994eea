"""A request's time at a worker: every second is in one sum, whatever happens to the request."""

from __future__ import annotations

import random

from blockserve.common.api.spans import PhaseTimes
from blockserve.worker.requests.clock import SpanClock, State


def test_a_request_that_one_process_executes() -> None:
    clock = SpanClock(10.0)
    clock.computed(7, True, 12.0, 13.0, State.READY)
    clock.computed(1, False, 13.5, 14.0, State.READY)
    clock.computed(1, False, 14.0, 15.0, State.READY)
    running = clock.times(15.25)
    assert running.running
    clock.enter(State.ENDED, 15.5)
    times = clock.times(99.0)
    assert not times.running
    assert (times.queued, times.opening, times.attempts) == (2.0, 0.0, 1)
    assert times.prompt == PhaseTimes(passes=1, tokens=7, seconds=1.0, longest=1.0)
    assert times.decode == PhaseTimes(passes=2, tokens=2, seconds=1.5, longest=1.0, waited=1.0)
    assert times.seconds == 5.5
    assert running.seconds == 5.25


def test_the_head_of_a_path() -> None:
    clock = SpanClock(0.0)
    clock.enter(State.OPENING, 1.0)
    clock.begin_again(1.5)
    clock.enter(State.OPENING, 2.0)
    clock.enter(State.READY, 3.0)
    clock.computed(20, True, 3.0, 4.0, State.READY)
    clock.computed(4, True, 4.5, 5.0, State.AWAY)
    clock.came_back(7.0)
    clock.computed(1, False, 7.25, 7.5, State.AWAY)
    clock.came_back(8.0)
    clock.came_back(8.5)  # nothing is away
    clock.enter(State.ENDED, 8.0)
    times = clock.times(9.0)
    assert (times.queued, times.opening, times.attempts) == (1.5, 1.5, 2)
    assert times.prompt == PhaseTimes(2, 24, 1.5, 1.0, 0.5, 2.0, 1)
    assert times.decode == PhaseTimes(1, 1, 0.25, 0.25, 0.25, 0.5, 1)
    assert times.seconds == 8.0


def test_a_follower_is_idle_until_something_comes() -> None:
    clock = SpanClock(0.0)
    clock.enter(State.IDLE, 0.0)
    clock.arrived(5.0)
    clock.arrived(5.5)
    clock.computed(8, True, 6.0, 7.0, State.READY)
    clock.computed(8, True, 7.0, 8.0, State.IDLE)
    clock.arrived(10.0)
    clock.computed(1, False, 10.0, 10.5, State.IDLE)
    clock.enter(State.ENDED, 20.0)
    times = clock.times(20.0)
    assert times.prompt == PhaseTimes(2, 16, 2.0, 1.0, 1.0)
    assert times.decode == PhaseTimes(1, 1, 0.5, 0.5)
    assert times.seconds == 3.5


def test_no_second_is_lost_at_a_head_worker_whatever_happens() -> None:
    random_ = random.Random(4)
    for _ in range(200):
        now = 0.0
        clock = SpanClock(now)
        for _ in range(30):
            now += random_.random()
            match random_.randrange(4):
                case 0:
                    clock.enter(random_.choice((State.OPENING, State.READY, State.AWAY)), now)
                case 1:
                    clock.begin_again(now)
                case 2:
                    clock.came_back(now)
                case _ if clock.state in (State.READY, State.QUEUED):
                    start, now = now, now + random_.random()
                    after = random_.choice((State.READY, State.AWAY))
                    clock.computed(1, random_.random() < 0.5, start, now, after)
                case _:
                    clock.times(now)
        assert abs(clock.times(now + 1.0).seconds - (now + 1.0)) < 1e-9
