"""A wire that can be cut: TCP forwarded through the test, between processes and the server they share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Self


class Cut(Enum):
    """How a wire is cut: bytes vanish and nobody is told, or connections are reset and refused.

    A wire that is cut one way loses what goes to the server, or what comes from it; the other way is whole.
    """

    SILENT = "silent"
    REFUSED = "refused"
    TO_SERVER = "to server"
    FROM_SERVER = "from server"


class CuttableWire:
    """Forwards to a port. One event loop.

    Attributes:
        port: where to connect to, on 127.0.0.1.
        num_stopped: how often bytes or connections did not come through.
    """

    def __init__(self, target: Callable[[], int]) -> None:
        """Prepare; `target` says the port to forward to, asked for each connection."""
        self._target = target
        self._cut: Cut | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.num_stopped = 0

    async def start(self) -> Self:
        """Begin to forward."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        """Forward no more."""
        if self._server is not None:
            self._server.close()
        self._drop_connections()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextmanager
    def cut(self, how: Cut) -> Iterator[None]:
        """Nothing comes through that way meanwhile; connections from before are gone afterwards."""
        self._cut = how
        if how is Cut.REFUSED:
            self.num_stopped += len(self._writers)
            self._drop_connections()
        try:
            yield
        finally:
            self._cut = None
            self._drop_connections()

    def _drop_connections(self) -> None:
        for writer in list(self._writers):
            writer.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._cut is Cut.REFUSED:
                self.num_stopped += 1
                return
            there, back = await self._connect()
            self._writers.add(back)
            try:
                await asyncio.gather(
                    self._copy(reader, back, Cut.TO_SERVER), self._copy(there, writer, Cut.FROM_SERVER)
                )
            finally:
                self._writers.discard(back)
                back.close()
        except OSError:
            # The server is down, or one side went: the other side sees its connection close.
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._target())

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Cut) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self._cut in (Cut.SILENT, Cut.REFUSED, way):
                    self.num_stopped += 1
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()
