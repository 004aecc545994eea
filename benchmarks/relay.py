"""A bare grpc.aio relay: what a router is compared with. Started by router_rps.py.

It does the least that can stand between a worker's one stream and many callers: it takes every message apart,
finds the caller, and writes one message with its tokens. It knows no variants, text, limits, paths, metrics,
deadlines or failures.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

from blockproto.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from blockserve.common.process.event_loop import run_in_event_loop
from blockserve.common.process.threads import take_turns
from blockserve.common.rpc.channel import Credentials, open_channel

Tokens = list[worker_pb2.OutputToken]


class Relay(inference_pb2_grpc.InferenceServiceServicer):
    """Speaks Generate to callers and Serve to one worker."""

    def __init__(self, worker: str) -> None:
        """Open the stream to the worker; needs a running loop."""
        self._numbers = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[Tokens]] = {}
        self._outgoing: asyncio.Queue[worker_pb2.ServeRequest] = asyncio.Queue()
        self._channel = open_channel(worker, Credentials())
        self._call = worker_pb2_grpc.WorkerServiceStub(self._channel).Serve()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    async def Generate(  # noqa: N802 - the wire's name
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Pass one request on and its tokens back."""
        del context
        number = next(self._numbers)
        queue = self._queues[number] = asyncio.Queue()
        span = worker_pb2.SpanRequest(
            prompt=request.token_ids.ids, max_tokens=request.stopping.max_tokens, request_id=str(number)
        )
        start = worker_pb2.StartRequest(number=number, request=span)
        self._outgoing.put_nowait(worker_pb2.ServeRequest(start=[start]))
        finished = False
        while not finished:
            tokens = await queue.get()
            while not queue.empty():
                tokens = [*tokens, *queue.get_nowait()]
            finished = bool(tokens[-1].finish)
            yield inference_pb2.GenerateResponse(
                first_token_index=tokens[0].index, token_ids=[token.token_id for token in tokens]
            )
        del self._queues[number]

    async def _read(self) -> None:
        async for message in self._call:
            for progress in message.progress:
                self._queues[progress.number].put_nowait(list(progress.tokens))

    async def _write(self) -> None:
        while True:
            await self._call.write(await self._outgoing.get())


async def main() -> None:
    """Serve until killed, on the loop that our processes have and with threads that take turns."""
    take_turns()
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Relay(os.environ["BLOCKZOO_WORKER"]), server)
    address = os.environ["BLOCKZOO_LISTEN"]
    server.add_insecure_port(address)
    await server.start()
    print(f"ready {address}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    run_in_event_loop(main())
