"""Running a server until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

from blockserve.common.process.event_loop import run_in_event_loop
from blockserve.common.process.logs import configure_logging
from blockserve.common.process.tasks import end
from blockserve.common.rpc.settings import ServerSettings
from blockzoo.errors import BlockzooError

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after a second Ctrl-C, as shells report an interrupted program."""


class RunnableServer(Protocol):
    """A process's server."""

    async def start(self) -> None:
        """Begin to serve; cancelled when the process is told to stop meanwhile."""
        ...

    async def stop(self) -> None:
        """End what runs, within the settings' bounds."""
        ...

    def remove_own_socket(self) -> None:
        """Leave no socket file behind when there is no time for `stop`."""
        ...


@runtime_checkable
class FailingServer(Protocol):
    """A server that may end though nobody stopped it."""

    async def failed(self) -> BlockzooError:
        """Wait until the server can do no more work, and say why; most wait for ever."""
        ...


S = TypeVar("S", bound=RunnableServer)


def run(settings: ServerSettings, server: S, on_ready: Callable[[S], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; blocks. A second signal ends the process at once.

    Args:
        settings: of the process; this takes what it says about logs.
        server: not started yet.
        on_ready: called once the server has started, for example to print its address.

    Raises:
        BlockzooError: the server cannot start, or failed for good later on.
    """
    configure_logging(settings.log_level, settings.log_format, settings.log_file)
    run_in_event_loop(serve(server, on_ready))


async def serve(server: S, on_ready: Callable[[S], None] | None = None) -> None:
    """`run` inside an event loop that the caller has; the main thread's, because of the signals."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("signal=%s again: ending at once", number.name)
            server.remove_own_socket()
            # Threads inside a matrix product would hold up every gentler way.
            os._exit(INTERRUPTED)
        log.info("signal=%s: stopping, again to end at once", number.name)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        started = await _start(server, stop)
        # What the start made lives as long as the server: the collector need not look through it again.
        gc.freeze()
        gc.enable()
        if started:
            if on_ready is not None:
                on_ready(server)
            try:
                failure = await _until_end(server, stop)
            finally:  # even where the server cannot say what happened, its lease and its socket must go
                await server.stop()
            if failure is not None:
                raise failure
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _until_end(server: RunnableServer, stop: asyncio.Event) -> BlockzooError | None:
    """Wait until the server is told to stop (None), or can do no more work."""
    stopping = asyncio.create_task(stop.wait())
    failing = asyncio.create_task(server.failed()) if isinstance(server, FailingServer) else None
    await asyncio.wait({stopping, failing} if failing else {stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if failing is None or not failing.done():
        await end(failing)
        return None
    failure = failing.result()
    log.critical("the process ends: %s", failure)
    return failure


async def _start(server: RunnableServer, stop: asyncio.Event) -> bool:
    """Start the server, or give up when told to stop meanwhile; says whether it runs."""
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        await starting
        return True
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False
