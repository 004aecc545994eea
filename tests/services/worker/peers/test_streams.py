"""Links to other workers over real gRPC: what may wait there is bounded, and a loss is told once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.rpc.channel import Credentials
from blockserve.worker.peers.convert import from_frame
from blockserve.worker.peers.messages import AttemptId, ChunkMsg
from blockserve.worker.peers.streams import PeerStreams
from support.edge import async_test

WINDOW = 1 << 16
CHUNK = 1 << 14
PEER = WorkerId("slow")


@dataclass
class SlowWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Takes messages, and says that it has dealt with some when the test says so."""

    starts: list[int] = field(default_factory=list)
    takes: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def Exchange(
        self, request_iterator: AsyncIterator[worker_pb2.ExchangeRequest], context: Any
    ) -> AsyncIterator[worker_pb2.ExchangeResponse]:
        async def read() -> None:
            async for frame in request_iterator:
                self.starts += [one.start for one in from_frame(frame) if isinstance(one, ChunkMsg)]

        reading = asyncio.create_task(read())
        try:
            while (num_bytes := await self.takes.get()) >= 0:
                yield worker_pb2.ExchangeResponse(taken_bytes=num_bytes)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def joined(folder: Path) -> AsyncIterator[tuple[PeerStreams, SlowWorker, PathStep]]:
    limit = ("grpc.max_receive_message_length", 16 << 20)  # the default of `max_message_bytes`
    worker, server = SlowWorker(), grpc.aio.server(options=[limit])
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
    address = f"unix:{folder}/slow.sock"
    server.add_insecure_port(address)
    await server.start()
    streams = PeerStreams(WorkerId("me"), Credentials(), WINDOW)
    try:
        yield streams, worker, PathStep(PEER, address, Run(2, 4))
    finally:
        await streams.close()
        await server.stop(0)


class Listener:
    """Notes what it hears."""

    def __init__(self) -> None:
        self.lost: list[WorkerId] = []
        self.taken: list[tuple[WorkerId, int]] = []

    def peer_lost(self, worker: WorkerId) -> None:
        self.lost.append(worker)

    def note_taken(self, sender: WorkerId, num_bytes: int) -> None:
        self.taken.append((sender, num_bytes))


def attach(streams: PeerStreams) -> list[WorkerId]:
    """The workers that are lost from now on."""
    listener = Listener()
    streams.attach(listener)
    return listener.lost


@async_test
async def test_what_the_engine_has_taken_is_told_in_the_event_loop() -> None:
    streams, listener = PeerStreams(WorkerId("me"), Credentials(), WINDOW), Listener()
    streams.taken(PEER, 1)  # nobody listens yet
    streams.attach(listener)
    await asyncio.to_thread(streams.taken, PEER, 20)
    await until(lambda: listener.taken)
    assert listener.taken == [(PEER, 20)]


def chunk(start: int) -> ChunkMsg:
    hidden = torch.zeros(CHUNK // (4 * 64), 64)  # [tokens, hidden], CHUNK bytes
    return ChunkMsg(AttemptId("r", 0, 1), 1, start, tuple(range(len(hidden))), hidden)


@async_test
async def test_a_pass_larger_than_a_message_arrives(tmp_path: Path) -> None:
    async with joined(tmp_path) as (streams, worker, step):
        lost = attach(streams)
        hidden = torch.zeros(5000, 1024)  # 20 MB
        large = ChunkMsg(AttemptId("r", 0, 1), 1, 0, tuple(range(5000)), hidden)
        await asyncio.to_thread(streams.send, step, [large, chunk(7777)])
        await until(lambda: 7777 in worker.starts or lost)
        assert worker.starts == [*range(0, 5000, 1024), 7777]


async def push_while_room(streams: PeerStreams, step: PathStep, first: int, most: int = 100) -> int:
    """As the engine does: a pass, whose messages go out, as long as there is room; says how many went."""
    for sent in range(most):
        if not streams.has_room(step):
            return sent
        await asyncio.to_thread(streams.send, step, [chunk(first + sent)])
        await asyncio.sleep(0)
    raise AssertionError("a worker that takes nothing was sent everything")


async def until(is_so: Any) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


@async_test
async def test_what_waits_at_a_slow_worker_is_bounded(tmp_path: Path) -> None:
    async with joined(tmp_path) as (streams, worker, step):
        sent = await push_while_room(streams, step, 0)
        assert sent * CHUNK == WINDOW
        # Having arrived is not having been computed on.
        await until(lambda: len(worker.starts) == sent)
        assert not streams.has_room(step)
        for _ in range(5):
            worker.takes.put_nowait(2 * CHUNK)
            await until(lambda: streams.has_room(step))
            sent += (more := await push_while_room(streams, step, sent))
            assert more == 2
        await until(lambda: len(worker.starts) == sent)
        assert worker.starts == list(range(sent))


@async_test
async def test_a_loss_is_told_once_and_begins_anew(tmp_path: Path) -> None:
    async with joined(tmp_path) as (streams, worker, step):
        lost = attach(streams)
        await push_while_room(streams, step, 0)
        await until(lambda: worker.starts)
        worker.takes.put_nowait(-1)  # ends the stream
        await until(lambda: lost)
        assert streams.has_room(step)
        worker.starts.clear()
        await push_while_room(streams, step, 0)
        await until(lambda: len(worker.starts) == WINDOW // CHUNK)
        assert lost == [PEER]
