"""Running a server until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable

from blockserve.embedded.config import ServeConfig
from blockserve.embedded.logs import configure_logging
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.startup import Parts

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after a second Ctrl-C, as shells report an interrupted program."""


def run(
    config: ServeConfig,
    *,
    parts: Parts | None = None,
    on_ready: Callable[[EmbeddedServer], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; blocks. A second signal ends the process at once.

    Args:
        config: the settings.
        parts: instead of the real zoo and engine.
        on_ready: called once the server says SERVING, for example to print its address.

    Raises:
        BlockzooError: the server cannot start.
    """
    configure_logging(config.log_level, config.log_format)
    asyncio.run(serve(config, parts=parts, on_ready=on_ready))


async def serve(
    config: ServeConfig,
    *,
    parts: Parts | None = None,
    on_ready: Callable[[EmbeddedServer], None] | None = None,
) -> None:
    """`run` inside an event loop that the caller has; the main thread's, because of the signals."""
    server = EmbeddedServer(config, parts=parts)
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
            await stop.wait()
            await server.stop()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _start(server: EmbeddedServer, stop: asyncio.Event) -> bool:
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
