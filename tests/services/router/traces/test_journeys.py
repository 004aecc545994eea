"""The paths of requests, by a clock that tests set."""

from __future__ import annotations

import itertools

import pytest

from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    PathStep,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.common.api.spans import SpanTimes
from blockserve.router.traces.journeys import Journeys

A, B = WorkerId("a.1"), WorkerId("b.1")
PATH = (PathStep(A, "unix:/a", Run(0, 3)), PathStep(B, "unix:/b", Run(3, 6)))
OTHER = (PathStep(B, "unix:/b", Run(0, 6)),)
VIEW = ClusterView(
    {
        A: WorkerView(WorkerRecord(A, "a", "unix:/a"), LoadReport(hop_seconds={B: 0.5})),
        B: WorkerView(WorkerRecord(B, "b", "unix:/b"), LoadReport(hop_seconds={A: 0.25})),
    }
)


def ticking() -> Journeys:
    """A clock that goes on by a second with each look at it."""
    seconds = itertools.count()
    return Journeys(2, clock=lambda: float(next(seconds)))


def test_a_request_that_goes_on_elsewhere_has_two_paths() -> None:
    journeys = ticking()
    with journeys.follow("r") as journey:  # 0
        leg = journey.begin(0)
        leg.choose(PATH, VIEW)  # 1
        leg.send()  # 2
        leg.finish("worker a is gone")  # 3
        leg.finish()
        leg = journey.begin(1)
        leg.choose(OTHER, VIEW)  # 4
        leg.send("recompute: owner_lost")  # 5
        leg.finish()  # 6
    times = SpanTimes(queued=1.0)
    first, second = journeys.trace(["r", "unknown"], {(B, "r", 1, 0): times}, VIEW)["r"]
    assert (first.epoch, first.choosing, first.moving, first.running) == (0, 1.0, 1.0, 1.0)
    assert (first.ended, first.moved) == ("worker a is gone", "")
    assert [(step.name, step.run, step.times) for step in first.steps] == [
        ("a", Run(0, 3), None),
        ("b", Run(3, 6), None),
    ]
    assert [step.hop_seconds for step in first.steps] == [0.5, 0.25]
    assert (second.epoch, second.choosing, second.running, second.ended) == (1, 1.0, 1.0, "")
    assert second.moved == "recompute: owner_lost"
    assert [step.times for step in second.steps] == [times]
    assert journeys.workers(["r", "unknown"]) == {A: "unix:/a", B: "unix:/b"}


def test_running_requests_are_counted_by_path() -> None:
    journeys = ticking()
    with journeys.follow("r") as one, journeys.follow("s") as two, journeys.follow("t") as three:
        for journey in (one, two):
            journey.begin(0).choose(PATH, VIEW)
        three.begin(0)
        (counted,) = journeys.running().items()
        assert ([name for _, name in counted[0]], counted[1]) == (["a", "b"], 2)
        (path,) = journeys.trace(["t"], {}, VIEW)["t"]
        assert path.steps == ()
        assert path.choosing > 0
    assert not journeys.running()


def fail_on_a_path(journeys: Journeys, name: str) -> None:
    with journeys.follow(name) as journey:
        journey.begin(0).choose(PATH, ClusterView())
        raise RuntimeError


def test_an_error_ends_the_last_path_and_old_journeys_are_forgotten() -> None:
    journeys = ticking()
    for name in ("r", "s", "t"):
        with pytest.raises(RuntimeError):
            fail_on_a_path(journeys, name)
    found = journeys.trace(["r", "s", "t"], {}, VIEW)
    assert list(found) == ["s", "t"]
    (path,) = found["s"]
    assert [step.name for step in path.steps] == [A, B]  # unknown workers keep their ids
