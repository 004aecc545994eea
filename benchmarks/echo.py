"""A bare grpc.aio server that sends every frame back: what a hop is compared with. Started by hop.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

METHOD = "/bench.Echo/Exchange"


async def _echo(frames: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    del context
    async for frame in frames:
        yield frame


class _Handler(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        del handler_call_details
        return grpc.stream_stream_rpc_method_handler(_echo)


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
    asyncio.run(main())
