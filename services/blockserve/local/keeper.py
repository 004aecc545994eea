"""Keeps one process running: starts it, watches it, starts it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from blockserve.common.errors import LocalClusterError, StateStoreError
from blockserve.local.plan import ProcessSpec, next_delay
from blockserve.local.processes import Running
from blockserve.local.record import RecordedProcess

START_SECONDS = 120.0
"""Importing torch several times at once takes long on a small machine."""
LOOK_SECONDS = 0.1


class Observer(Protocol):
    """Is told what happens to the processes, in the event loop."""

    def ready(self, name: str, address: str) -> None:
        """A process takes calls."""
        ...

    def ended(self, name: str, status: int, delay: float) -> None:
        """A process has ended by itself and is started again after so many seconds."""
        ...


class Keeper:
    """One process of a cluster, over its lives. One event loop.

    Attributes:
        spec: what it runs.
        address: where the process listens; "" until it is ready.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        launch: Callable[[ProcessSpec], Running],
        observer: Observer,
        on_change: Callable[[], None],
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            spec: what to run.
            launch: starts it; runs in a thread.
            observer: is told what happens.
            on_change: called when there is another process, or none.
            look_seconds: how often it is looked at.
        """
        self.spec = spec
        self.address = ""
        self._launch = launch
        self._observer = observer
        self._on_change = on_change
        self._look_seconds = look_seconds
        self._running: Running | None = None
        self._since = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def process(self) -> RecordedProcess | None:
        """What runs, if anything does."""
        if self._running is None:
            return None
        return RecordedProcess(self.spec.name, self._running.identity, self.address)

    async def start(self) -> None:
        """Start the process and wait until it is ready; from then on it is kept running.

        Raises:
            LocalClusterError: it ended instead, or is not ready in time.
        """
        running = await self._begin()
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready(running):
            if running.status() is not None or time.monotonic() > deadline:
                message, hint = error_in(running.last_words())
                raise LocalClusterError(
                    f"{self.spec.name} did not start: {message}",
                    hint=f"{hint} Its log is in the cluster's folder.".strip(),
                )
            await asyncio.sleep(self._look_seconds)
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.spec.name}")

    async def release(self) -> None:
        """Start it no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def end(self, patience: float) -> None:
        """End the process, which may take so many seconds of its own."""
        running = self._running
        if running is None:
            return
        await asyncio.to_thread(running.ask_to_end)
        deadline = time.monotonic() + patience
        while running.status() is None and time.monotonic() < deadline:
            await asyncio.sleep(self._look_seconds)
        await self._forget(running)

    async def _begin(self) -> Running:
        """A new process. When we are cancelled meanwhile it is still known, so that it can be ended."""
        launching = asyncio.ensure_future(asyncio.to_thread(self._launch, self.spec))
        try:
            running = await asyncio.shield(launching)
        except asyncio.CancelledError:
            self._running = await launching
            raise
        self._running, self._since, self.address = running, time.monotonic(), ""
        self._on_change()
        return running

    async def _forget(self, running: Running) -> None:
        await asyncio.to_thread(running.close)
        self._running, self.address = None, ""
        self._on_change()

    def _is_ready(self, running: Running) -> bool:
        if not self.address and (address := running.address()):
            self.address = address
            self._observer.ready(self.spec.name, address)
            self._on_change()
        return bool(self.address)

    async def _keep(self) -> None:
        delay = 0.0
        while True:
            status = await self._until_ended()
            delay = next_delay(delay, time.monotonic() - self._since)
            self._observer.ended(self.spec.name, status, delay)
            await asyncio.sleep(delay)
            try:
                await self._begin()
            except (LocalClusterError, StateStoreError, OSError):
                # The machine may be short of something for a while: that counts as one more short life.
                self._since = time.monotonic()

    async def _until_ended(self) -> int:
        """The exit status of the process; -1 when it did not even start."""
        running = self._running
        if running is None:
            return -1
        while (status := running.status()) is None:
            self._is_ready(running)
            await asyncio.sleep(self._look_seconds)
        await self._forget(running)
        return status


def error_in(log: str) -> tuple[str, str]:
    """The sentence and the hint that a process printed before it ended; its last two lines."""
    message, hint = ["", "", *log.strip().splitlines()][-2:]
    if not message.lower().startswith("error: "):
        message, hint = hint, ""  # an end without a hint, or of another kind: its last line says most
    return message.partition(": ")[2] if message.lower().startswith("error: ") else message, hint
