"""A worker without a model, to measure a router: answers each request at once. Started by router_rps.py.

It announces that it holds all of the zoo's variant `base` and speaks WorkerService.Serve. A prompt's first
token says how an answer travels: `AT_ONCE` all tokens in one message, `IN_PASSES` one token of every request
in flight in each message, as a real worker's passes send them, `SEPARATE` each token in a message of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

from blockproto.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import (
    LoadReport,
    ResidentSegment,
    Run,
    WorkerId,
    WorkerRecord,
    segment_digest,
)
from blockserve.common.process.event_loop import run_in_event_loop
from blockserve.common.state.opening import open_store
from blockserve.common.state.settings import StateConfig
from blockserve.common.state.store import Announcement
from blockzoo.zoo import Zoo

AT_ONCE, IN_PASSES, SEPARATE = 10, 11, 12
LEASE_SECONDS = 600.0
NAME = WorkerId("fake.0")


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Speaks Serve."""

    async def Serve(  # noqa: N802 - the wire's name
        self, request_iterator: AsyncIterator[worker_pb2.ServeRequest], context: Any
    ) -> AsyncIterator[worker_pb2.ServeResponse]:
        """Answer everything at once."""
        del context
        arrived: list[worker_pb2.StartRequest] = []
        wake = asyncio.Event()

        async def read() -> None:
            async for message in request_iterator:
                arrived.extend(message.start)
                wake.set()

        reader = asyncio.create_task(read())
        running: dict[int, tuple[int, int]] = {}  # tokens sent and wanted, by the request's number
        try:
            while True:
                if not running and not arrived:
                    wake.clear()
                    await wake.wait()
                for one in arrived:
                    kind, wanted = one.request.prompt[0], one.request.max_tokens
                    if kind == IN_PASSES:
                        running[one.number] = 0, wanted
                    elif kind == AT_ONCE:
                        yield worker_pb2.ServeResponse(progress=[_progress(one.number, 0, wanted, wanted)])
                    else:
                        for token in range(wanted):
                            yield worker_pb2.ServeResponse(
                                progress=[_progress(one.number, token, token + 1, wanted)]
                            )
                arrived.clear()
                if running:
                    yield worker_pb2.ServeResponse(
                        progress=[
                            _progress(number, sent, sent + 1, wanted)
                            for number, (sent, wanted) in running.items()
                        ]
                    )
                    running = {
                        number: (sent + 1, wanted)
                        for number, (sent, wanted) in running.items()
                        if sent + 1 < wanted
                    }
                    await asyncio.sleep(0)  # let requests in between passes
        finally:
            reader.cancel()


def _progress(number: int, first: int, end: int, wanted: int) -> worker_pb2.RequestProgress:
    """Tokens first .. end - 1 of a request for `wanted`."""
    tokens = [worker_pb2.OutputToken(index=index, token_id=1000 + index) for index in range(first, end)]
    if end == wanted:
        tokens[-1].finish = inference_pb2.FINISH_REASON_LENGTH
    return worker_pb2.RequestProgress(number=number, tokens=tokens)


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(FakeWorker(), server)
    address = os.environ["BLOCKZOO_LISTEN"]
    server.add_insecure_port(address)
    await server.start()
    zoo = Zoo.open(os.environ["BLOCKZOO_ZOO"])
    links = zoo.chain(zoo.resolve("base").chain).links
    run = Run(0, len(links))
    segment = ResidentSegment(segment_digest(links, run.first, run.end), run)
    store = open_store(StateConfig(url=os.environ["BLOCKZOO_STATE_URL"]))
    record = WorkerRecord(NAME, "fake", address)
    await store.announce(Announcement(record, LoadReport(), {segment}), lease_seconds=LEASE_SECONDS)
    print(f"ready {address}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    run_in_event_loop(main())
