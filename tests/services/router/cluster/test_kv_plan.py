"""What can be fetched from which worker of the old path, and what that is expected to take."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    PathStep,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.router.cluster.kv_plan import KvCosts, Move, Reason, estimate, plan_moves


def _view(**layouts: str) -> ClusterView:
    load = LoadReport(prefill_tokens_per_second=1000.0, kv_token_bytes=1000)
    return ClusterView(
        {
            WorkerId(name): WorkerView(
                WorkerRecord(WorkerId(name), name, f"{name}:1", kv_fingerprint=layout), load
            )
            for name, layout in layouts.items()
        }
    )


def _path(**runs: tuple[int, int]) -> tuple[PathStep, ...]:
    return tuple(PathStep(WorkerId(name), f"{name}:1", Run(*run)) for name, run in runs.items())


VIEW = _view(a="v1", b="v1", c="v1", d="v2")
OLD = _path(a=(0, 4), b=(4, 9))


def _step(name: str, first: int, end: int) -> PathStep:
    return _path(**{name: (first, end)})[0]


@pytest.mark.parametrize(
    ("new", "lost", "moves", "reason"),
    [
        # The head, at position 8, has no keys and values.
        (_path(a=(0, 4), c=(4, 9)), None, [Move(OLD[1], _step("c", 4, 9), Run(4, 8))], None),
        (
            _path(c=(0, 9)),
            None,
            [
                Move(OLD[0], _step("c", 0, 9), Run(1, 4)),
                Move(OLD[1], _step("c", 0, 9), Run(4, 8)),
            ],
            None,
        ),
        (
            _path(a=(0, 5), c=(5, 9)),
            None,
            [
                Move(OLD[0], _step("a", 0, 5), Run(1, 4)),
                Move(OLD[1], _step("a", 0, 5), Run(4, 5)),
                Move(OLD[1], _step("c", 5, 9), Run(5, 8)),
            ],
            None,
        ),
        (_path(b=(0, 9)), "a", [], Reason.OWNER_LOST),
        (_path(c=(0, 4), b=(4, 12)), None, [], Reason.OTHER_RUNS),
        (_path(a=(0, 4), c=(4, 9)), "b", [], Reason.OWNER_LOST),
        (_path(gone=(0, 4), c=(4, 9)), "a", [], Reason.OWNER_LOST),
        (_path(a=(0, 4), d=(4, 9)), None, [], Reason.OTHER_LAYOUT),
        (_path(d=(0, 9)), None, [], Reason.OTHER_LAYOUT),
        (OLD, None, [], None),
    ],
)
def test_what_can_be_fetched(
    new: tuple[PathStep, ...], lost: str | None, moves: list[Move], reason: Reason | None
) -> None:
    assert plan_moves(OLD, new, VIEW, WorkerId(lost) if lost else None) == (moves, reason)


def test_an_owner_without_a_lease_is_not_asked() -> None:
    without = ClusterView({name: one for name, one in VIEW.workers.items() if name != "b"})
    assert plan_moves(OLD, _path(a=(0, 4), c=(4, 9)), without, None) == ([], Reason.OWNER_LOST)


def test_the_estimates_are_bytes_over_bandwidth_and_tokens_over_speed() -> None:
    new = _path(a=(0, 4), c=(4, 9))
    moves, _ = plan_moves(OLD, new, VIEW, None)
    costs = KvCosts(bytes_per_second=1e6, transfer_seconds=0.5)
    found = estimate(moves, new, 200, VIEW, costs, 0.0)
    assert found.transfer == pytest.approx(0.5 + 200 * 4 * 1000 / 1e6)
    assert found.recompute == pytest.approx(0.2)
    assert estimate(moves, new, 200, VIEW, costs, 1e9).transfer == pytest.approx(0.5008)


def test_sources_send_at_the_same_time_and_what_is_there_is_not_sent() -> None:
    costs = KvCosts(bytes_per_second=1e6, transfer_seconds=0.5)
    for new, num_layers in (
        (_path(c=(0, 9)), 4),  # three layers of a, four of b
        (_path(a=(0, 5), c=(5, 9)), 4),  # one and three of b, the others are where they are
        (_path(a=(0, 3), b=(3, 9)), 1),
    ):
        moves, _ = plan_moves(OLD, new, VIEW, None)
        found = estimate(moves, new, 200, VIEW, costs, 0.0)
        assert found.transfer == pytest.approx(0.5 + 200 * num_layers * 1000 / 1e6)


@st.composite
def _paths(draw: st.DrawFn, length: int) -> tuple[PathStep, ...]:
    """A path over a chain of some length, cut anywhere between layers, over any of a few workers."""
    cuts = draw(st.sets(st.integers(2, length - 2), max_size=4)) if length > 3 else set()
    borders = [0, *sorted(cuts), length]
    names = draw(st.permutations("abcefg"))
    return tuple(_step(name, *pair) for name, pair in zip(names, pairwise(borders), strict=False))


@given(st.data(), st.integers(3, 14))
def test_every_layer_comes_from_the_one_worker_that_executed_it(data: st.DataObject, length: int) -> None:
    before, after = data.draw(_paths(length)), data.draw(_paths(length))
    view = _view(**dict.fromkeys("abcefg", "v1"))
    moves, reason = plan_moves(before, after, view, None)
    assert reason is None
    for target in after:
        layers = set(range(target.run.first, target.run.end)) & set(range(1, length - 1))
        fetched = [move for move in moves if move.target == target]
        if target in before:
            assert not fetched
            continue
        found = [layer for move in fetched for layer in range(move.layers.first, move.layers.end)]
        assert found == sorted(layers)
        for move in fetched:
            assert move.source in before
            assert move.source.run.covers(move.layers)
    # Who was lost matters only where something of it is needed.
    lost = data.draw(st.sampled_from([step.worker for step in before]))
    needed = {move.source.worker for move in moves}
    expected = ([], Reason.OWNER_LOST) if lost in needed else (moves, None)
    assert plan_moves(before, after, view, lost) == expected
