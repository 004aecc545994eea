"""Two workers cannot share a name, but one may follow another under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import ClusterView, WorkerId, WorkerRecord, WorkerState, WorkerView
from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.rpc.channel import Credentials
from blockserve.worker.peers.names import refuse_taken_name

ME = WorkerRecord(WorkerId("w.2"), "w", "127.0.0.1:1")


class Servicer(worker_pb2_grpc.WorkerServiceServicer):
    async def Describe(self, request: Any, context: Any) -> worker_pb2.DescribeResponse:  # type: ignore[override]
        return worker_pb2.DescribeResponse(worker_id="w.1", name="w")


@asynccontextmanager
async def other() -> AsyncIterator[WorkerRecord]:
    """A worker of the name that lives."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield WorkerRecord(WorkerId("w.1"), "w", f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


async def start(*others: WorkerRecord, error: Exception | None = None) -> None:
    async def view() -> ClusterView:
        if error is not None:
            raise error
        return ClusterView({one.id: WorkerView(one) for one in others})

    await refuse_taken_name(SimpleNamespace(view=view), ME, Credentials())  # type: ignore[arg-type]


def test_a_live_worker_keeps_its_name() -> None:
    async def work() -> None:
        async with other() as known:
            with pytest.raises(ConfigurationError, match="another worker is called 'w'") as caught:
                await start(known)
            assert "--name" in caught.value.hint
            await start(replace(known, name="v"))
            await start(replace(known, state=WorkerState.DRAINING))
            await start(replace(known, id=WorkerId("w.0")))  # an earlier life at that address
        await start(known)

    asyncio.run(work())


def test_without_the_shared_state_a_worker_starts() -> None:
    asyncio.run(start(error=StateStoreError("down")))
