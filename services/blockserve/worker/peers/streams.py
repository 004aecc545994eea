"""The way to other workers: one long-lived stream to each, opened on first use. Lives in the event loop.

The engine's thread hands over messages and never waits. What has been sent and not yet been computed on at
the other side is bounded (`has_room`): a slow worker slows down who sends to it, and nobody's memory grows.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import WIRE_VERSION, PathStep, WorkerId
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.worker.peers.convert import hidden_bytes, to_frame
from blockserve.worker.peers.frames import FRAME_BYTES, frames
from blockserve.worker.peers.messages import SpanMsg

log = logging.getLogger(__name__)

FROM_KEY, TO_KEY, WIRE_KEY = "blockzoo-from", "blockzoo-to", "blockzoo-wire"
"""Metadata keys of an exchange: sender id, expected receiver id, wire version."""
PROBE_SECONDS = 1.0
"""How often the time of a hop is measured: about as often as a lease is renewed."""
PROBE_TIMEOUT_SECONDS = 5.0
NEW_SHARE = 0.2
"""What the newest measurement counts in the moving mean."""


class StreamListener(Protocol):
    """Receives news of streams, in the event loop."""

    def peer_lost(self, worker: WorkerId) -> None:
        """A worker cannot be reached."""
        ...

    def note_taken(self, sender: WorkerId, num_bytes: int) -> None:
        """The engine has computed on, or dropped, `num_bytes` of a sender's hidden states."""
        ...


class PeerStreams:
    """Streams to other workers; see `blockserve.worker.engine.exchange.Outlet`."""

    def __init__(self, me: WorkerId, credentials: Credentials, window_bytes: int) -> None:
        """Begin with no streams; to be made in the event loop that will run them.

        Args:
            me: the worker that speaks.
            credentials: how it proves itself.
            window_bytes: hidden states that may wait at another worker, at most, for each stream.
        """
        self._me = me
        self._credentials = credentials
        self._window_bytes = window_bytes
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._streams: dict[WorkerId, _Stream] = {}
        self._in_flight: dict[WorkerId, int] = {}  # changed in the event loop, read by the engine's thread
        self._hops: dict[WorkerId, float] = {}
        self._pauses: dict[WorkerId, int] = {}  # changed in the engine's thread
        self._listener: StreamListener | None = None

    def attach(self, listener: StreamListener) -> None:
        """Send news of streams to `listener`, which can only be made after its engine and the streams."""
        self._listener = listener

    # ---- called by who drives the engine

    def send(self, step: PathStep, messages: Sequence[SpanMsg]) -> None:
        """Have messages delivered in order, or the worker be reported as lost."""
        size = hidden_bytes(messages)
        if size <= FRAME_BYTES:  # nearly always
            self._call(partial(self._push, step, to_frame(messages), size))
            return
        for part in frames(messages):
            self._call(partial(self._push, step, to_frame(part), hidden_bytes(part)))

    def has_room(self, step: PathStep) -> bool:
        """Whether less than a window of what was sent still waits at the worker."""
        if self._in_flight.get(step.worker, 0) < self._window_bytes:
            return True
        self._pauses[step.worker] = self._pauses.get(step.worker, 0) + 1
        return False

    def taken(self, sender: WorkerId, num_bytes: int) -> None:
        """Tell a worker that this much of what it sent waits no longer."""
        if (listener := self._listener) is not None:
            self._call(partial(listener.note_taken, sender, num_bytes))

    def _call(self, action: Callable[[], None]) -> None:
        if threading.get_ident() == self._loop_thread:
            action()
            return
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            log.debug("message dropped: the event loop is closed")

    # ---- called in any thread

    def in_flight_bytes(self) -> Mapping[WorkerId, int]:
        """Hidden states that were sent to each worker with a stream and wait there."""
        return dict(self._in_flight)

    def window_pauses(self) -> Mapping[WorkerId, int]:
        """How often `has_room` said no of each worker with a stream."""
        return dict(self._pauses)

    # ---- called in the event loop

    def hop_seconds(self) -> Mapping[WorkerId, float]:
        """One way to each worker with a stream, a moving mean: half the round trip of a small call.

        Acknowledgements of hidden states tell nothing here: they come after the other side has computed.
        """
        return dict(self._hops)

    async def close(self) -> None:
        """End all streams; what has not been sent is dropped."""
        streams = list(self._streams.values())
        self._streams.clear()
        await asyncio.gather(*(stream.close() for stream in streams))

    def _push(self, step: PathStep, frame: worker_pb2.ExchangeRequest, size: int) -> None:
        stream = self._streams.get(step.worker)
        if stream is None:
            stream = self._streams[step.worker] = _Stream(self, step)
        self._in_flight[step.worker] = self._in_flight.get(step.worker, 0) + size
        stream.push(frame)

    def _note_taken(self, worker: WorkerId, num_bytes: int) -> None:
        self._in_flight[worker] = max(0, self._in_flight.get(worker, 0) - num_bytes)

    def _note_hop(self, stream: _Stream, seconds: float) -> None:
        worker = stream.step.worker
        if self._streams.get(worker) is stream:
            known = self._hops.get(worker, seconds)
            self._hops[worker] = known + NEW_SHARE * (seconds - known)

    def _note_end(self, stream: _Stream, reason: str) -> None:
        if self._streams.get(stream.step.worker) is not stream:
            return
        del self._streams[stream.step.worker]
        self._in_flight.pop(stream.step.worker, None)
        self._pauses.pop(stream.step.worker, None)
        self._hops.pop(stream.step.worker, None)
        log.warning("worker lost worker=%s address=%s: %s", stream.step.worker, stream.step.address, reason)
        if self._listener is not None:
            self._listener.peer_lost(stream.step.worker)


class _Stream:
    """One stream to one worker."""

    def __init__(self, streams: PeerStreams, step: PathStep) -> None:
        self.step = step
        self._streams = streams
        self._frames: deque[worker_pb2.ExchangeRequest] = deque()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"stream to {step.worker}")

    def push(self, frame: worker_pb2.ExchangeRequest) -> None:
        """Send a frame after those before it."""
        self._frames.append(frame)
        self._wake.set()

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        reason = "it ended the connection"
        channel = open_channel(self.step.address, self._streams._credentials)
        try:
            metadata = (
                (FROM_KEY, self._streams._me),
                (TO_KEY, self.step.worker),
                (WIRE_KEY, str(WIRE_VERSION)),
                *self._streams._credentials.metadata(),
            )
            call = worker_pb2_grpc.WorkerServiceStub(channel).Exchange(metadata=metadata)
            helpers = [asyncio.create_task(self._write(call)), asyncio.create_task(self._probe(channel))]
            try:
                async for response in call:
                    self._streams._note_taken(self.step.worker, response.taken_bytes)
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name} {error.details()}"
        finally:
            await channel.close(None)
            self._streams._note_end(self, reason)

    async def _write(self, call: Any) -> None:
        while True:
            while self._frames:
                await call.write(self._frames.popleft())
            self._wake.clear()
            await self._wake.wait()

    async def _probe(self, channel: grpc.aio.Channel) -> None:
        """Measure the hop now and then; a failed call measures nothing, the stream itself tells of a loss."""
        stub, metadata = health_pb2_grpc.HealthStub(channel), self._streams._credentials.metadata()
        while True:
            begun = time.perf_counter()
            try:
                await stub.Check(
                    health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_SECONDS, metadata=metadata
                )
            except grpc.aio.AioRpcError as error:
                log.debug("hop not measured worker=%s: %s", self.step.worker, error.code().name)
            else:
                self._streams._note_hop(self, (time.perf_counter() - begun) / 2)
            await asyncio.sleep(PROBE_SECONDS)
