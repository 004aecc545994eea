"""A bare grpc.aio server that sends every frame back: what a hop is compared with. Started by hop.py.

With `BLOCKZOO_ECHO_WORKS` it first reads as many bytes as a pass reads weights. A process that only echoes
has everything it needs in its caches; one that computes between two frames has not.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from blockserve.common.process.event_loop import run_in_event_loop

METHOD = "/bench.Echo/Exchange"
_WEIGHTS = np.ones(1 << 22, dtype=np.float32)
"""16 MiB: more than the caches of a core, as the weights of a span are."""


def work() -> float:
    """Read what a pass would read; seconds it took."""
    started = time.perf_counter()
    _WEIGHTS.sum()
    return time.perf_counter() - started


async def _working_echo(frames: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    del context
    async for frame in frames:
        seconds = work()
        yield struct.pack("<d", seconds) + frame


async def _echo(frames: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    del context
    async for frame in frames:
        yield frame


class _Handler(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        del handler_call_details
        works = bool(os.environ.get("BLOCKZOO_ECHO_WORKS"))
        return grpc.stream_stream_rpc_method_handler(_working_echo if works else _echo)


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Handler(),))
    listen = os.environ["BLOCKZOO_LISTEN"]
    port = server.add_insecure_port(listen)
    await server.start()
    print(f"ready {listen if listen.startswith('unix:') else f'127.0.0.1:{port}'}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    run_in_event_loop(main())
