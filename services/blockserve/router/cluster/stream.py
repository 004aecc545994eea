"""The router's stream to one worker: all requests whose path begins there, in one call."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import PathStep, WorkerId
from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.errors import BreakCause, PathBrokenError
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.wire.engine import error_from_message, request_to_message, token_from_message
from blockserve.common.wire.errors import from_rpc_error
from blockzoo.errors import BlockzooError

log = logging.getLogger(__name__)

DRAIN_SECONDS = 15.0
"""How much longer than it was given a worker may take to drain: others fetch keys and values from it."""
Outcome = Sequence[TokenEvent] | BlockzooError


@dataclass(slots=True, eq=False)
class _Running:
    """A request at the worker."""

    request: EngineRequest
    outcomes: deque[Outcome] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None

    def put(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Until there is an outcome; for the one who takes them."""
        if not self.outcomes:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter

    def take(self) -> Outcome:
        """The next error, or all tokens before it: what piled up while we were busy goes on as one."""
        outcome = self.outcomes.popleft()
        while self.outcomes and not isinstance(outcome, BlockzooError):
            more = self.outcomes[0]
            if isinstance(more, BlockzooError):
                break
            outcome = [*outcome, *more]
            self.outcomes.popleft()
        return outcome


class WorkerStream:
    """Requests at one worker. One event loop; the stream is opened by the first request.

    Attributes:
        is_closed: whether it has broken or been ended; another one has to take its place.
    """

    def __init__(self, worker: WorkerId, address: str, credentials: Credentials) -> None:
        """Prepare; nothing is connected yet."""
        self.worker = worker
        self.address = address
        self._credentials = credentials
        self._numbers = itertools.count(1)
        self._running: dict[int, _Running] = {}
        self._outgoing = worker_pb2.ServeRequest()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.is_closed = False

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    def steps(self) -> set[PathStep]:
        """Every step of the paths of its requests."""
        return {step for running in self._running.values() for step in running.request.path}

    async def run(self, request: EngineRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Run one request; closing the iterator cancels it.

        Raises:
            PathBrokenError: a worker on the path was lost.
            BlockzooError: whatever the workers refuse it with.
        """
        if self.is_closed:
            raise _lost(self.worker, "it has gone")
        number, running = next(self._numbers), _Running(request)
        self._running[number] = running
        self._outgoing.start.add(number=number, request=request_to_message(request))
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name=f"stream to {self.worker}")
        try:
            while True:
                while running.outcomes:
                    outcome = running.take()
                    if isinstance(outcome, BlockzooError):
                        raise outcome
                    yield outcome
                    if outcome[-1].finish is not None:
                        return
                await running.wait()
        finally:
            if self._running.pop(number, None) is not None:
                self._cancel(number)

    def fail_through(self, worker: WorkerId, reason: str) -> None:
        """Another worker is lost: the requests whose path goes through it go on elsewhere."""
        for number, running in list(self._running.items()):
            if any(step.worker == worker for step in running.request.path):
                running.put(_lost(worker, reason))
                del self._running[number]
                self._cancel(number)

    def fail_all(self, reason: str) -> None:
        """The worker is lost: its requests go on elsewhere, and no new ones come here."""
        self.is_closed = True
        for running in self._running.values():
            running.put(_lost(self.worker, reason))

    async def close(self) -> None:
        """End the stream."""
        self.is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _cancel(self, number: int) -> None:
        if not self.is_closed:
            self._outgoing.cancel.append(number)
            self._wake.set()

    async def _serve(self) -> None:
        reason = "it ended the connection"
        channel = open_channel(self.address, self._credentials)
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call: Any = stub.Serve(metadata=self._credentials.metadata())
            writer = asyncio.create_task(self._write(call))
            try:
                while (response := await call.read()) is not grpc.aio.EOF:
                    for progress in response.progress:
                        self._take(progress)
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name} {error.details()}"
        finally:
            self.fail_all(reason)
            await channel.close(None)

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            message, self._outgoing = self._outgoing, worker_pb2.ServeRequest()
            await call.write(message)

    def _take(self, progress: worker_pb2.RequestProgress) -> None:
        running = self._running.get(progress.number)
        if running is None:
            return
        if progress.HasField("error"):
            del self._running[progress.number]
            running.put(error_from_message(progress.error))
            return
        wants_prompt = running.request.prompt_logprobs
        tokens = [
            token_from_message(token, prompt_logprobs=wants_prompt, timing=True) for token in progress.tokens
        ]
        if tokens[-1].finish is not None:
            del self._running[progress.number]
        running.put(tokens)


def _lost(worker: WorkerId, reason: str) -> PathBrokenError:
    return PathBrokenError(f"worker {worker}: {reason}", cause=BreakCause.LOST, worker=worker)


async def answers(worker: WorkerId, address: str, credentials: Credentials, seconds: float) -> bool:
    """Whether this life of a worker can be reached now."""
    async with open_channel(address, credentials) as channel:
        try:
            described = await worker_pb2_grpc.WorkerServiceStub(channel).Describe(
                worker_pb2.DescribeRequest(), timeout=seconds, metadata=credentials.metadata()
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(described.worker_id == worker)


async def drain(address: str, credentials: Credentials, seconds: float, *, resume: bool) -> int:
    """Have a worker take no new requests, or some again; how many it gave back.

    Raises:
        UnavailableError: it cannot be reached.
    """
    async with open_channel(address, credentials) as channel:
        request = worker_pb2.DrainRequest(seconds=seconds, resume=resume)
        try:
            answer = await worker_pb2_grpc.WorkerServiceStub(channel).Drain(
                request, timeout=seconds + DRAIN_SECONDS, metadata=credentials.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    return answer.given_back
