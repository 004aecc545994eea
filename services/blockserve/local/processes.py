"""Starting the processes of a local cluster: each ends when we do, however we end."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Protocol

from blockserve.common.errors import LocalClusterError
from blockserve.common.process.guarded import GuardedChild
from blockserve.common.process.redis_child import RedisChild
from blockserve.local.identity import ProcessIdentity, identify, send
from blockserve.local.layout import Layout
from blockserve.local.plan import STATE, ProcessSpec

_NOBODY = ProcessIdentity(0, 0, "")
"""Instead of a process that had ended before it could be looked at."""


class Running(Protocol):
    """A process that was started. Every call may block for a moment."""

    @property
    def identity(self) -> ProcessIdentity:
        """Which process it is."""
        ...

    def address(self) -> str:
        """Where it listens; "" until it is ready."""
        ...

    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        ...

    def last_words(self) -> str:
        """The last of what it has printed."""
        ...

    def ask_to_end(self) -> None:
        """Let it end in its own time."""
        ...

    def close(self) -> None:
        """End it within seconds, if it has not ended, and forget it."""
        ...


class Launcher:
    """Starts processes; the state server has to be the first."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._password = secrets.token_urlsafe(24)
        self._state_url = ""

    def __call__(self, spec: ProcessSpec) -> Running:
        """Start one process.

        Raises:
            LocalClusterError: it could not be started.
            StateStoreError: there is no program for the state server, or it does not answer.
        """
        if spec.service == STATE:
            state = RedisChild(socket_path=self._layout.socket(spec.name), password=self._password)
            self._state_url = state.url
            return StateProcess(state)
        environment = spec.environment(os.environ, self._state_url)
        command = [sys.executable, "-m", f"blockserve.{spec.service}"]
        return ServiceProcess(spec.name, command, environment, self._layout.log(spec.name))


class StateProcess:
    """The running state server; see `Running`."""

    def __init__(self, server: RedisChild) -> None:
        self._server = server
        self.identity = identify(server.pid) or _NOBODY

    def address(self) -> str:
        """It answered before it was handed out."""
        return f"unix:{self._server.socket_path}"

    def status(self) -> int | None:
        """What it ended with is not known; it never ends by itself."""
        return None if self._server.is_running else 1

    def last_words(self) -> str:
        """It logs only what is wrong at its start, which its start then says."""
        return ""

    def ask_to_end(self) -> None:
        """Nothing of it has to be finished."""
        self._server.stop()

    def close(self) -> None:
        """End it."""
        self._server.stop()


class ServiceProcess:
    """A running worker, router or controller; see `Running`.

    It prints `ready ADDRESS` once it takes calls.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._begin = log.stat().st_size if log.exists() else 0
        self._address = ""
        self._child = GuardedChild(command, environment=environment, log=log)
        if self._child.pid is None:
            words = self._child.output
            self._child.stop()
            raise LocalClusterError(f"{name} could not be started: {words[-300:]}")
        self.identity = identify(self._child.pid) or _NOBODY

    def address(self) -> str:
        """What it printed."""
        if not self._address:
            with self._log.open("rb") as log:
                log.seek(self._begin)
                for line in log:
                    if line.startswith(b"ready ") and line.endswith(b"\n"):
                        self._address = line.decode().split()[1]
        return self._address

    def status(self) -> int | None:
        """128 + n when signal n ended it."""
        return None if self._child.is_running else self._child.wait(0)

    def last_words(self) -> str:
        """Of its log."""
        return self._child.output

    def ask_to_end(self) -> None:
        """SIGTERM to the process itself, not to what guards it."""
        send(self.identity, signal.SIGTERM)

    def close(self) -> None:
        """The guard gives it seconds, then kills it."""
        self._child.stop()
