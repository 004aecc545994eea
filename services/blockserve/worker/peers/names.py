"""Names of workers are theirs alone: placement and operators mean one worker by a name."""

from __future__ import annotations

from contextlib import suppress

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import ClusterView, WorkerRecord, WorkerState
from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.state.store import StateStore

ANSWER_SECONDS = 1.0
"""How long a worker of the same name may take to say that it lives."""


async def refuse_taken_name(store: StateStore, record: WorkerRecord, credentials: Credentials) -> None:
    """Refuse to start beside a live worker of the same name.

    A former life of this worker may still have its lease; it does not answer any more. One that drains may be
    what this worker replaces.

    Raises:
        ConfigurationError: another worker answers to the name.
    """
    view = ClusterView()
    with suppress(StateStoreError):
        view = await store.view()
    for known in (one.record for one in view.workers.values()):
        if (known.name, known.state) != (record.name, WorkerState.READY) or known.address == record.address:
            continue
        if await _answers(known, credentials):
            raise ConfigurationError(
                f"another worker is called {known.name!r}, at {known.address}",
                hint="Give this one another name with --name, or stop the other.",
                worker=known.id,
            )


async def _answers(record: WorkerRecord, credentials: Credentials) -> bool:
    """Whether this life of a worker can be reached."""
    async with open_channel(record.address, credentials) as channel:
        try:
            described = await worker_pb2_grpc.WorkerServiceStub(channel).Describe(
                worker_pb2.DescribeRequest(), timeout=ANSWER_SECONDS, metadata=credentials.metadata()
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(described.worker_id == record.id)
