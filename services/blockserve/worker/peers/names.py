"""Names of workers are theirs alone: placement and operators mean one worker by a name."""

from __future__ import annotations

import asyncio
import time

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import WorkerId, WorkerRecord, WorkerState
from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.state.store import Announcement, StateStore

ANSWER_SECONDS = 1.0
"""How long a worker of the same name may take to say that it lives."""
PAUSE_SECONDS = 0.1
"""Between two attempts to get a name that another worker has."""
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)
"""Answers of an address where no worker listens any more."""


async def announce_alone(
    store: StateStore,
    announcement: Announcement,
    credentials: Credentials,
    *,
    lease_seconds: float,
    is_start: bool,
) -> ConfigurationError | None:
    """Announce a worker, unless another live one has its name.

    The store gives a name to one worker in one step, so of any number that start at once one gets it. Its
    server answers by then, and tells the others that it lives. The lease of a worker that was killed is no
    obstacle to a worker that starts: nobody listens at its address, so it loses the lease at once. A worker
    that drains keeps its lease beside the worker that replaces it.

    Args:
        store: shared state.
        announcement: the worker and what it says about itself.
        credentials: for the question to the worker that has the name.
        lease_seconds: how long this worker is believed to live.
        is_start: whether this is the first announcement. A worker whose name was taken while it was paused
            or cut off ends another one's lease in no case: two that cannot reach each other would take
            turns.

    Returns:
        None once it is announced; otherwise why not: another worker has the name and lives.

    Raises:
        StateStoreError: the store cannot be reached.
    """
    aside: set[WorkerId] = set()
    ended: set[WorkerId] = set()
    asked_since: dict[WorkerId, float] = {}
    while (
        holder := await store.announce(announcement, lease_seconds=lease_seconds, instead_of=aside)
    ) is not None:
        view = (await store.view()).workers.get(holder)
        if view is None:  # its lease has ended meanwhile
            continue
        if view.record.state is WorkerState.DRAINING:
            aside.add(holder)
            continue
        since = asked_since.setdefault(holder, time.monotonic())
        lives = await _lives(view.record, credentials)
        # Without an answer it is the lease that counts, and whoever renews it lives.
        if lives or time.monotonic() > since + 2 * max(lease_seconds, ANSWER_SECONDS):
            return ConfigurationError(
                f"another worker is called {view.record.name!r}, at {view.record.address}",
                hint="Give this one another name with --name, or stop the other.",
                worker=holder,
            )
        if lives is False and is_start:
            aside.add(holder)
            ended.add(holder)
        else:
            await asyncio.sleep(PAUSE_SECONDS)
    for worker in ended:
        await store.withdraw(worker)
    return None


async def _lives(record: WorkerRecord, credentials: Credentials) -> bool | None:
    """Whether this life of a worker still listens at its address; None when nothing answers in time."""
    async with open_channel(record.address, credentials) as channel:
        try:
            described = await worker_pb2_grpc.WorkerServiceStub(channel).Describe(
                worker_pb2.DescribeRequest(), timeout=ANSWER_SECONDS, metadata=credentials.metadata()
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            return error.code() not in _GONE  # a refusal of our credentials is an answer
    return bool(described.worker_id == record.id)
