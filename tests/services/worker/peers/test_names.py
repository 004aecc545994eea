"""Two workers cannot share a name, but one may follow another under it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import LoadReport, WorkerId, WorkerRecord, WorkerState
from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.channel import Credentials
from blockserve.common.state.memory import InProcessStore
from blockserve.common.state.store import Announcement
from blockserve.worker.peers import names
from blockserve.worker.peers.names import announce_alone

ME = WorkerRecord(WorkerId("w.2"), "w", "127.0.0.1:1")
LONG, SHORT = 60.0, 0.3


class Servicer(worker_pb2_grpc.WorkerServiceServicer):
    """Answers as a worker; refuses, or hangs."""

    def __init__(self, worker: str, refusal: grpc.StatusCode | None = None, hangs: bool = False) -> None:
        self._worker, self._refusal, self._hangs = worker, refusal, hangs

    async def Describe(self, request: Any, context: Any) -> worker_pb2.DescribeResponse:  # type: ignore[override]
        if self._hangs:
            await asyncio.sleep(3600)
        if self._refusal is not None:
            await context.abort(self._refusal, "no")
        return worker_pb2.DescribeResponse(worker_id=self._worker, name="w")


@asynccontextmanager
async def other(worker: str = "w.1", **manners: Any) -> AsyncIterator[WorkerRecord]:
    """A worker of the name that lives."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Servicer(worker, **manners), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield WorkerRecord(WorkerId(worker), "w", f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


async def held(*records: WorkerRecord, lease: float = LONG) -> InProcessStore:
    """A state in which these workers have their leases."""
    store = InProcessStore()
    for record in records:
        await store.announce(Announcement(record, LoadReport(), ()), lease_seconds=lease)
    return store


async def begin(
    store: InProcessStore, record: WorkerRecord = ME, *, is_start: bool = True, lease: float = LONG
) -> ConfigurationError | None:
    said = Announcement(record, LoadReport(), ())
    return await announce_alone(store, said, Credentials(), lease_seconds=lease, is_start=is_start)


async def known(store: InProcessStore) -> set[str]:
    return set((await store.view()).workers)


def test_a_live_worker_keeps_its_name() -> None:
    async def work() -> None:
        async with other() as one:
            store = await held(one)
            taken = await begin(store)
            assert "another worker is called 'w', at 127.0.0.1:" in str(taken)
            assert taken is not None
            assert "--name" in taken.hint
            assert await known(store) == {"w.1"}
            assert await begin(store, replace(ME, name="v")) is None
            assert await known(store) == {"w.1", "w.2"}

    asyncio.run(work())


def test_one_that_drains_is_followed_and_keeps_its_lease() -> None:
    async def work() -> None:
        async with other() as one:
            store = await held(replace(one, state=WorkerState.DRAINING))
            assert await begin(store) is None
            assert await known(store) == {"w.1", "w.2"}

    asyncio.run(work())


def test_one_that_was_killed_is_followed_at_once_and_loses_its_lease() -> None:
    async def work() -> None:
        async with other() as one:
            pass
        store = await held(one)
        began = time.monotonic()
        assert await begin(store) is None
        assert time.monotonic() - began < LONG / 4
        assert await known(store) == {"w.2"}

    asyncio.run(work())


def test_an_address_where_another_worker_answers_is_no_sign_of_life() -> None:
    async def work() -> None:
        async with other("v.1") as somebody:
            store = await held(replace(somebody, id=WorkerId("w.1")))
            assert await begin(store) is None

    asyncio.run(work())


def test_a_refusal_of_our_credentials_is_a_sign_of_life() -> None:
    async def work() -> None:
        async with other(refusal=grpc.StatusCode.UNAUTHENTICATED) as one:
            assert await begin(await held(one)) is not None

    asyncio.run(work())


def test_without_an_answer_the_lease_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "ANSWER_SECONDS", SHORT)

    async def work() -> None:
        async with other(hangs=True) as one:
            store = await held(one, lease=2 * SHORT)
            assert await begin(store, lease=LONG) is None  # the lease was not renewed
            assert await known(store) == {"w.2"}
            store = await held(one)
            assert await begin(store, lease=SHORT) is not None  # it was, or it is a long one
            assert await known(store) == {"w.1"}

    asyncio.run(work())


def test_a_worker_that_was_replaced_ends_nobodys_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "PAUSE_SECONDS", 0.01)

    async def work() -> None:
        async with other() as one:
            assert await begin(await held(one), is_start=False) is not None
        store = await held(one, lease=SHORT)  # cannot be reached, and may live
        waiting = asyncio.create_task(begin(store, is_start=False))
        await asyncio.sleep(SHORT / 3)
        assert (waiting.done(), await known(store)) == (False, {"w.1"})
        assert await waiting is None
        assert await known(store) == {"w.2"}

    asyncio.run(work())


def test_of_many_that_follow_one_at_once_one_has_the_name() -> None:
    async def work() -> None:
        async with other() as former:
            pass
        store = await held(former)
        servers = [other(f"w.{i}") for i in range(2, 10)]
        records = [await server.__aenter__() for server in servers]
        answers = await asyncio.gather(*(begin(store.another(), record) for record in records))
        assert await known(store) == {r.id for r, taken in zip(records, answers, strict=True) if not taken}
        assert answers.count(None) == 1
        for server in servers:
            await server.__aexit__(None, None, None)

    asyncio.run(work())
