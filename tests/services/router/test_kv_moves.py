"""Transfer or recompute: when fetching is possible, and which is expected to be over first."""

import pytest

from blockserve.common.cluster import (
    ClusterView,
    LoadReport,
    PathStep,
    Run,
    WorkerId,
    WorkerRecord,
    WorkerView,
)
from blockserve.router.kv_moves import KvCosts, Move, Reason, estimate, plan_moves


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


@pytest.mark.parametrize(
    ("new", "lost", "moves", "reason"),
    [
        (_path(a=(0, 4), c=(4, 9)), None, [Move(OLD[1], _path(c=(4, 9))[0])], None),
        (_path(a=(0, 4), c=(4, 9)), "b", [], Reason.OWNER_LOST),
        (_path(gone=(0, 4), c=(4, 9)), "a", [], Reason.OWNER_LOST),
        (_path(a=(0, 5), c=(5, 9)), None, [], Reason.OTHER_RUNS),
        (_path(c=(0, 9)), None, [], Reason.OTHER_RUNS),
        (_path(a=(0, 4), d=(4, 9)), None, [], Reason.OTHER_LAYOUT),
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
    assert found.transfer == pytest.approx(0.5 + 200 * 5 * 1000 / 1e6)
    assert found.recompute == pytest.approx(0.2)
    assert estimate(moves, new, 200, VIEW, costs, 1e9).transfer == pytest.approx(0.501)
