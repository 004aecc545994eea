"""A server whose engine has ended ends its process, with a status that says so."""

from __future__ import annotations

import asyncio

import pytest

from blockserve.common.errors import EngineFailedError
from blockserve.common.process.run import serve
from blockzoo.errors import BlockzooError


class Server:
    """Counts its stops; fails when told to."""

    def __init__(self) -> None:
        self.failure: asyncio.Future[BlockzooError] = asyncio.get_running_loop().create_future()
        self.stops = 0

    async def start(self) -> None:
        """See `RunnableServer`."""

    async def stop(self) -> None:
        """See `RunnableServer`."""
        self.stops += 1

    def remove_own_socket(self) -> None:
        """See `RunnableServer`."""

    async def failed(self) -> BlockzooError:
        """See `FailingServer`."""
        return await self.failure


def test_a_failure_stops_the_server_and_is_raised() -> None:
    async def work() -> None:
        server = Server()
        running = asyncio.create_task(serve(server))
        await asyncio.sleep(0.05)
        assert not running.done()
        server.failure.set_result(EngineFailedError("the engine ended"))
        with pytest.raises(EngineFailedError):
            await running
        assert server.stops == 1

    asyncio.run(work())


def test_a_server_that_cannot_say_what_happened_is_stopped_too() -> None:
    async def work() -> None:
        server = Server()
        server.failure.set_exception(KeyError("a fault of ours"))
        with pytest.raises(KeyError):
            await serve(server)
        assert server.stops == 1

    asyncio.run(work())
