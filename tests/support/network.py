"""A server over a real zoo in a thread of its own, and a wire that counts, cuts and holds what it carries."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.embedded.startup import Parts, open_zoo
from blockzoo.zoo import Zoo
from support.edge import ScriptedEngine

WAIT = 60.0
"""Ends a test that hangs; never reached by one that works."""


class ZooServer:
    """An `EmbeddedServer` over a real zoo and a scripted engine."""

    def __init__(self, zoo: Path | Zoo, **settings: Any) -> None:
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        opened = zoo if isinstance(zoo, Zoo) else None
        parts = Parts(
            open_zoo=lambda url: opened or open_zoo(url),
            make_engine=lambda zoo, config: ScriptedEngine(),
            import_engine=lambda: None,
        )
        place = {} if opened else {"zoo": str(zoo), "create_zoo": True}
        config = EmbeddedSettings.load(**{"listen": "127.0.0.1:0", "drain_seconds": 0.0, **place, **settings})
        self.server = EmbeddedServer(config, parts=parts)
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        assert self._ready.wait(WAIT)
        if self._failure is not None:
            raise self._failure

    @property
    def address(self) -> str:
        return self.server.address

    async def _serve(self) -> None:
        try:
            await self.server.start()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._failure = error
            self._ready.set()
            return
        self._ready.set()
        await self._stop.wait()
        await self.server.stop()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(WAIT)
            self._loop.close()


@contextmanager
def zoo_server(zoo: Path | Zoo, **settings: Any) -> Iterator[ZooServer]:
    server = ZooServer(zoo, **settings)
    try:
        yield server
    finally:
        server.close()


class Wire:
    """Carries TCP connections to a server.

    Attributes:
        sent: bytes from clients to the server, all connections together.
        answered: bytes from the server to clients.
        connections: how many there were.
        cut_at: for each connection in turn, after how many bytes to the server it is cut; then no more.
        answers_cut_at: the same for bytes from the server.
        on_sent: called with the total after bytes were carried to the server, and may block.
    """

    def __init__(
        self, target: str, cut_at: Iterator[int] | None = None, answers_cut_at: Iterator[int] | None = None
    ) -> None:
        self.target = target
        self.sent = 0
        self.answered = 0
        self.connections = 0
        self.cut_at = cut_at or iter(())
        self.answers_cut_at = answers_cut_at or iter(())
        self.on_sent: Callable[[int], None] = lambda total: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            host, port = self.target.rsplit(":", 1)
            try:
                server = socket.create_connection((host, int(port)))
            except OSError:
                client.close()
                continue
            self.connections += 1
            limit, answers = next(self.cut_at, None), next(self.answers_cut_at, None)
            for source, sink, most in ((client, server, limit), (server, client, answers)):
                forward = (source, sink, most, source is client)
                threading.Thread(target=self._carry, args=forward, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, limit: int | None, to_server: bool) -> None:
        carried = 0
        try:
            while data := source.recv(1 << 16):
                if limit is not None:
                    data = data[: limit - carried]
                sink.sendall(data)
                carried += len(data)
                if to_server:
                    self.sent += len(data)
                    self.on_sent(self.sent)
                else:
                    self.answered += len(data)
                if limit is not None and carried >= limit:
                    break
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire(
    target: str, cut_at: Iterator[int] | None = None, answers_cut_at: Iterator[int] | None = None
) -> Iterator[Wire]:
    carrier = Wire(target, cut_at, answers_cut_at)
    try:
        yield carrier
    finally:
        carrier.close()


def objects(zoo: Zoo) -> set[str]:
    """Keys of all blobs and manifests."""
    storage = zoo.store.storage
    return {info.key for folder in ("blobs", "blocks", "chains") for info in storage.list(folder)}
