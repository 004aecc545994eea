"""What runs stays, what has ended goes in the order in which it ended."""

from __future__ import annotations

from blockserve.common.tracing.recent import Recent


def test_the_oldest_ended_entries_go_first_and_running_ones_stay() -> None:
    recent: Recent[int, str] = Recent(2)
    for number in range(5):
        recent.begin(number, f"entry {number}")
    for number in (3, 0, 1):
        recent.end(number)
    assert recent.get(3) is None
    assert (recent.get(0), recent.get(4)) == ("entry 0", "entry 4")
    assert list(recent.items()) == [(0, "entry 0"), (1, "entry 1"), (2, "entry 2"), (4, "entry 4")]
    assert list(recent.running()) == ["entry 2", "entry 4"]
    assert len(recent) == 4


def test_an_ended_entry_that_begins_again_runs() -> None:
    recent: Recent[int, str] = Recent(1)
    recent.begin(1, "first")
    recent.end(1)
    recent.begin(1, "second")
    recent.begin(2, "other")
    recent.end(2)
    recent.end(2)
    assert list(recent.items()) == [(2, "other"), (1, "second")]


def test_nothing_that_has_ended_is_kept_where_the_limit_is_zero() -> None:
    recent: Recent[int, str] = Recent(0)
    recent.begin(1, "entry")
    assert recent.get(1) == "entry"
    recent.end(1)
    assert len(recent) == 0
