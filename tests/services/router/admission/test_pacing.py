"""What refused callers are told, by a clock of our own."""

from __future__ import annotations

import pytest

from blockserve.router.admission.pacing import SHORTEST_SECONDS, Pacer


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def pacer(clock: Clock) -> Pacer:
    return Pacer(first_delay=1.5, max_delay=20.0, clock=clock)


def test_before_anything_is_measured_the_settings_speak() -> None:
    made = pacer(Clock())
    assert [made.delay(4), made.delay(4)] == [1.5, 1.5]
    assert made.wait(100, 4) == 0.0


def test_each_refused_caller_is_told_the_next_place() -> None:
    clock = Clock()
    made = pacer(clock)
    made.note_served(8.0)
    # Four at a time for eight seconds each: one ends every two seconds.
    assert [made.delay(4) for _ in range(4)] == [2.0, 4.0, 6.0, 8.0]
    clock.now += 6.0
    assert made.delay(4) == 4.0
    clock.now += 100.0
    assert made.delay(4) == 2.0


def test_no_caller_is_sent_away_for_longer_than_the_bound() -> None:
    clock = Clock()
    made = pacer(clock)
    made.note_served(8.0)
    told = [made.delay(2) for _ in range(50)]
    assert told[:5] == [4.0, 8.0, 12.0, 16.0, 20.0]
    assert set(told[5:]) == {20.0}
    # Those beyond the bound leave no debt behind.
    clock.now += 20.0
    assert made.delay(2) == 4.0


def test_fast_answers_still_mean_some_wait() -> None:
    made = pacer(Clock())
    made.note_served(0.0001)
    assert made.delay(64) == SHORTEST_SECONDS


def test_the_mean_follows_slowly() -> None:
    made = pacer(Clock())
    made.note_served(1.0)
    made.note_served(11.0)
    assert made.interval(2) == pytest.approx(1.0)
    for _ in range(100):
        made.note_served(11.0)
    assert made.interval(2) == pytest.approx(5.5, rel=0.01)


def test_the_wait_grows_with_the_queue_and_shrinks_with_the_batch() -> None:
    made = pacer(Clock())
    made.note_served(6.0)
    assert made.wait(0, 3) == 0.0
    assert made.wait(5, 3) == 10.0
    assert made.wait(5, 0) == 30.0
