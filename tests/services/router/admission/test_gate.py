"""Requests in progress: bounded, drained, and ended when the server does."""

from __future__ import annotations

import asyncio

import pytest

from blockserve.common.errors import QueueFullError, ServerStoppingError
from blockserve.router.admission.gate import Admission
from support.edge import async_test, until


async def hold(admission: Admission, until_set: asyncio.Event) -> str:
    with admission.admit():
        await until_set.wait()
    return "done"


@async_test
async def test_one_too_many_is_refused_and_told_when_to_come_back() -> None:
    admission, release = Admission(2, retry_after=1.5), asyncio.Event()
    tasks = [asyncio.create_task(hold(admission, release)) for _ in range(2)]
    await until(lambda: admission.num_requests == 2)
    with pytest.raises(QueueFullError) as caught, admission.admit():
        pass
    assert caught.value.retry_after == 1.5
    release.set()
    assert await asyncio.gather(*tasks) == ["done", "done"]
    with admission.admit():
        assert admission.num_requests == 1
    assert admission.num_requests == 0


@async_test
async def test_several_answers_take_several_places() -> None:
    admission = Admission(4, retry_after=1.0)
    with admission.admit(3):
        assert admission.num_requests == 3
        with pytest.raises(QueueFullError), admission.admit(2):
            pass
        with admission.admit():
            assert admission.num_requests == 4
    with (
        admission.admit(9),
        pytest.raises(QueueFullError),
        admission.admit(),
    ):  # the nine: nobody else is here
        pass
    assert admission.num_requests == 0


@async_test
async def test_draining_waits_for_those_inside_and_refuses_those_outside() -> None:
    admission, release = Admission(5, 1.0), asyncio.Event()
    inside = asyncio.create_task(hold(admission, release))
    await until(lambda: admission.num_requests == 1)
    draining = asyncio.create_task(admission.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(ServerStoppingError), admission.admit():
        pass
    assert not draining.done()
    release.set()
    assert await draining == 0
    assert await inside == "done"


@async_test
async def test_those_still_inside_at_the_bound_get_a_typed_error_not_a_cancellation() -> None:
    admission = Admission(5, 1.0)
    inside = asyncio.create_task(hold(admission, asyncio.Event()))
    await until(lambda: admission.num_requests == 1)
    assert await admission.drain(0.01) == 1
    with pytest.raises(ServerStoppingError):
        await inside
    assert not inside.cancelled()


@async_test
async def test_a_callers_own_cancellation_stays_one() -> None:
    admission = Admission(5, 1.0)
    inside = asyncio.create_task(hold(admission, asyncio.Event()))
    await until(lambda: admission.num_requests == 1)
    inside.cancel()
    with pytest.raises(asyncio.CancelledError):
        await inside
    assert admission.num_requests == 0


@async_test
async def test_draining_an_idle_server_takes_no_time() -> None:
    assert await Admission(5, 1.0).drain(0) == 0
