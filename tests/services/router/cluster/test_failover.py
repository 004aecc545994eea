"""The steps of a request whose paths break: pure, so every case is a few lines."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import (
    BreakCause,
    ChainNotLoadedError,
    DeadlineExceededError,
    EngineFailedError,
    PathBrokenError,
    ServerStoppingError,
)
from blockserve.router.cluster.failover import RETRYABLE, Failover, FailoverConfig, GiveUp, Retry
from blockzoo.errors import BlockzooError, CorruptBlobError, StorageError
from blockzoo.manifest import ChainId

A, B, C = map(WorkerId, "abc")
NOW = 100.0


def path(*workers: WorkerId) -> tuple[PathStep, ...]:
    return tuple(PathStep(worker, f"unix:/{worker}", Run(i, i + 1)) for i, worker in enumerate(workers))


def begin(
    config: FailoverConfig | None = None,
    *,
    output: tuple[int, ...] = (),
    epoch: int = 0,
    deadline: float | None = None,
) -> Failover:
    request = EngineRequest(
        "r",
        ChainId("c"),
        (1, 2),
        SamplingParams(),
        max_tokens=9,
        output=output,
        epoch=epoch,
        deadline=deadline,
    )
    return Failover(request, config or FailoverConfig())


def events(*indices: int) -> list[TokenEvent]:
    return [TokenEvent(index, 100 + index) for index in indices]


def ids(taken: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in taken]


def lost(worker: WorkerId = B, seen_by: str = "", cause: BreakCause = BreakCause.LOST) -> PathBrokenError:
    return PathBrokenError("gone", cause=cause, worker=worker, seen_by=seen_by)


def test_without_a_failure_every_token_goes_through_as_it_came() -> None:
    state = begin()
    attempt = state.attempt(path(A, B))
    assert (attempt.output, attempt.path, attempt.epoch) == ((), path(A, B), 0)
    first, more = events(0), events(1, 2)
    assert state.take(first) is first
    assert state.take(more) is more
    assert state.tokens == [100, 101, 102]
    assert (state.failures, state.excluded, state.previous, state.lost) == (0, set(), (), None)


def test_the_next_path_goes_on_behind_the_last_token() -> None:
    state = begin()
    state.attempt(path(A, B))
    state.take(events(0, 1))
    assert state.fail(lost(B), NOW) == Retry()
    assert (state.excluded, state.previous, state.lost) == ({B}, path(A, B), B)
    attempt = state.attempt(path(A, C))
    assert (attempt.output, attempt.path, attempt.epoch) == ((100, 101), path(A, C), 1)
    assert ids(state.take(events(2))) == [102]
    assert state.tokens == [100, 101, 102]


def test_the_previous_path_is_the_one_that_broke_last() -> None:
    state = begin()
    for steps in (path(A), path(B)):
        state.attempt(steps)
        state.fail(lost(steps[0].worker), NOW)
        assert (state.previous, state.excluded) == (steps, {steps[0].worker})


def test_tokens_that_the_new_path_repeats_are_dropped() -> None:
    state = begin()
    state.attempt(path(A))
    state.take(events(0, 1))
    state.fail(lost(A), NOW)
    state.attempt(path(B))
    assert ids(state.take(events(0))) == []
    assert ids(state.take(events(1, 2))) == [102]
    assert state.tokens == [100, 101, 102]


def test_tokens_that_the_request_came_with_count() -> None:
    state = begin(output=(100, 101), epoch=4)
    assert state.attempt(path(A)).output == (100, 101)
    assert ids(state.take(events(1, 2))) == [102]


def test_a_token_must_not_be_skipped() -> None:
    state = begin()
    state.take(events(0))
    with pytest.raises(EngineFailedError, match="token 2 came where 1"):
        state.take(events(2))


def test_a_draining_worker_is_avoided_and_still_asked_for_keys_and_values() -> None:
    state = begin()
    state.attempt(path(A, B))
    assert state.fail(lost(B, cause=BreakCause.DRAINING), NOW) == Retry()
    assert (state.excluded, state.lost) == ({B}, None)


@pytest.mark.parametrize("cause", [BreakCause.LOST, BreakCause.REPLACED])
def test_a_worker_that_is_gone_is_not_asked_for_keys_and_values(cause: BreakCause) -> None:
    state = begin()
    state.attempt(path(A, B))
    state.fail(lost(B, cause=cause), NOW)
    assert (state.excluded, state.lost) == ({B}, B)


def test_a_worker_that_another_cannot_reach_parts_the_two() -> None:
    state = begin()
    state.attempt(path(A, B))
    assert state.fail(lost(B, seen_by=A), NOW) == Retry(parted=(A, B))
    assert state.excluded == {B}


@pytest.mark.parametrize(
    "error",
    [
        ServerStoppingError("stopping"),
        ChainNotLoadedError("evicted"),
        PathBrokenError("elsewhere", cause=BreakCause.SUPERSEDED),
    ],
)
def test_an_error_that_blames_no_worker_excludes_none(error: BlockzooError) -> None:
    state = begin()
    state.attempt(path(A))
    state.fail(lost(A), NOW)
    assert isinstance(state.fail(error, NOW), Retry)
    assert (state.excluded, state.lost) == (set(), None)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_after_too_many_failures_the_caller_gets_the_last_error(most: int) -> None:
    state = begin(FailoverConfig(max_failures=most))
    for _ in range(most):
        state.attempt(path(A))
        assert isinstance(state.fail(lost(A), NOW), Retry)
    state.attempt(path(A))
    last = lost(C)
    assert state.fail(last, NOW) == GiveUp(last)
    assert (state.failures, state.epoch) == (most, most)


def test_a_request_whose_deadline_has_passed_is_given_up() -> None:
    state = begin(deadline=NOW)
    assert state.overdue(NOW - 0.1) is None
    assert isinstance(state.overdue(NOW), DeadlineExceededError)
    state.attempt(path(A))
    assert isinstance(state.fail(lost(A), NOW - 0.1), Retry)
    step = state.fail(lost(A), NOW)
    assert isinstance(step, GiveUp)
    assert isinstance(step.error, DeadlineExceededError)
    assert begin().overdue(float("inf")) is None


def test_epochs_rise_from_that_of_the_request() -> None:
    state = begin(epoch=5)
    epochs = []
    for _ in range(3):
        epochs.append(state.attempt(path(A)).epoch)
        state.fail(lost(A), NOW)
    assert (epochs, state.epoch) == ([5, 6, 7], 8)


def test_the_first_retry_is_at_once_and_the_pause_doubles_for_each_later_one() -> None:
    state = begin(FailoverConfig(backoff_seconds=0.5))
    pauses = []
    for _ in range(5):
        step = state.fail(lost(A), NOW)
        assert isinstance(step, Retry)
        pauses.append(step.pause_seconds)
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0]


def test_a_failed_pass_blames_who_computed_it() -> None:
    state = begin()
    state.attempt(path(A, B))
    assert state.fail(EngineFailedError("no memory", worker=B), NOW) == Retry()
    assert (state.excluded, state.lost, state.epoch) == ({B}, B, 1)
    state.attempt(path(A, C))
    assert isinstance(state.fail(lost(C), NOW), Retry)
    last = EngineFailedError("no memory")
    assert state.fail(last, NOW) == GiveUp(last)


@pytest.mark.parametrize("worker", [A, B])
def test_what_a_worker_cannot_read_is_asked_of_another(worker: WorkerId) -> None:
    """What it has in its caches is sound, so its keys and values may follow."""
    state = begin()
    state.attempt(path(A, B))
    error = StorageError("blobs/aa: Input/output error", worker=worker)
    assert isinstance(error, RETRYABLE)
    assert state.fail(error, NOW) == Retry()
    assert (state.excluded, state.previous, state.lost, state.faults) == ({worker}, path(A, B), None, 0)


def test_what_two_workers_find_damaged_is_damaged() -> None:
    state = begin()
    state.attempt(path(A))
    assert state.fail(CorruptBlobError("bad", worker=A), NOW) == Retry()
    state.attempt(path(B))
    again = CorruptBlobError("bad", worker=B)
    assert state.fail(again, NOW) == GiveUp(again)
