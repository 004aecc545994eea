"""Who runs an engine's passes, and when.

Everything that changes an engine's state happens in one place at a time, between two passes: commands (new
requests, cancellations, chains that come and go, what other workers say), then a pass. `ThreadDriver` has a
thread for that, beside the event loop: long passes hold nobody up. `LoopDriver` does it in the event loop,
where the news come, and gives only long passes to a thread: handing a short one over and its results back,
with the interpreter's lock changing hands each time, costs more than the pass (docs/log.md, 2026-11-27).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from blockkernels.backends import Backend
from blockserve.common.errors import EngineFailedError, ServerStoppingError
from blockserve.worker.engine.crew import Crew
from blockserve.worker.engine.passes import Pass, Passes

_LOG = logging.getLogger(__name__)

Command = Callable[[], None]
"""Changes the engine's state; must not raise."""

IDLE_SECONDS = 0.02
"""How long to wait for news, at most, while there are requests of which nothing can be computed now."""
SETTLE_ROUNDS = 3
"""Turns of the event loop between two passes: a message takes as many from the socket to the engine."""


class Driver(Protocol):
    """Runs an engine's commands and passes.

    Attributes:
        last_progress: `time.monotonic()` value of the end of the last turn, or of having nothing to do.
        failure: gets what ended the driver, if that was not `stop`.
    """

    last_progress: float
    failure: Future[EngineFailedError]

    def start(self) -> None:
        """Begin."""
        ...

    def stop(self) -> None:
        """End after the current pass; requests still in flight fail with ServerStoppingError. Waits."""
        ...

    def post(self, command: Command, *, at_once: bool = False) -> None:
        """Run a command before the next pass.

        Args:
            command: what to run.
            at_once: a request waits for just this: lose no time with gathering more commands.

        Raises:
            ServerStoppingError: the engine does not run.
        """
        ...


def _stopping() -> ServerStoppingError:
    return ServerStoppingError("the engine is not running", hint="Send the request to another server.")


def _stopped() -> ServerStoppingError:
    return ServerStoppingError("the server is stopping", hint="Send the request to another server.")


def _ended(cause: BaseException | None = None) -> EngineFailedError:
    why = "" if cause is None else f": {cause!r}"
    return EngineFailedError(f"the engine ended{why}", hint="Restart the server.")


class ThreadDriver:
    """A thread of its own; see `Driver`."""

    def __init__(self, passes: Passes, backend: Backend, num_threads: int, *, yields: bool = False) -> None:
        """Drive `passes`.

        Args:
            passes: what to drive.
            backend: computes them.
            num_threads: of a matrix product.
            yields: use fewer threads while other programs use the cores.
        """
        self._passes = passes
        self._backend = backend
        self._num_threads = num_threads
        self._crew = Crew(num_threads) if yields else None
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._is_idle = False  # the thread waits for work; guarded by `_wake`
        self.last_progress = time.monotonic()
        self.failure: Future[EngineFailedError] = Future()

    def start(self) -> None:
        """See `Driver`."""
        self._thread = threading.Thread(target=self._run, name="block-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """See `Driver`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def post(self, command: Command, *, at_once: bool = False) -> None:
        """See `Driver`; the thread looks at once in any case."""
        del at_once
        with self._wake:
            if self._stopping or self._thread is None:
                raise _stopping()
            if self._is_idle:
                # Having had nothing to do is not a lack of progress: the time to do this begins now.
                self._is_idle = False
                self.last_progress = time.monotonic()
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            # Nobody must wait for a thread that has ended.
            _LOG.critical("the engine's thread ended", exc_info=True)
            with self._wake:
                self._stopping = True
            for sink in list(self._passes.sinks.values()):
                sink(_ended())
            self._passes.deliver()
            self.failure.set_result(_ended(error))
            raise

    def _work(self) -> None:
        self._backend.prepare_thread(self._num_threads)
        has_computed = False
        while True:
            if not has_computed:
                self._passes.deliver()
            commands, stopping = self._wait(has_computed)
            for command in commands:
                command()
            if stopping:
                break
            has_computed = self._step()
            self.last_progress = time.monotonic()
        self._passes.fail_all(_stopped())
        self._passes.deliver()

    def _wait(self, has_computed: bool) -> tuple[list[Command], bool]:
        """Commands, and whether to stop; returns at once when there may be more to compute."""
        with self._wake:
            while not (self._commands or has_computed or self._stopping):
                self._is_idle = not self._passes.has_requests
                if not self._wake.wait(None if self._is_idle else IDLE_SECONDS):
                    break
            self._is_idle = False
            commands = list(self._commands)
            self._commands.clear()
            return commands, self._stopping

    def _step(self) -> bool:
        """Run a pass; False when there was nothing to compute.

        While there is work, outcomes are delivered just before the next pass computes: the event loops then
        have the interpreter to themselves, instead of competing for its lock with the preparation of that
        pass. Where others compute on, they are told first: callers hear of tokens while those compute.
        """
        work = self._passes.plan()
        if work is None:
            return False
        self._size_crew()
        self._passes.compute(work, before=None if work.is_handed_on else self._passes.deliver)
        self._passes.finish(work)
        if work.is_handed_on:
            self._passes.deliver()
        return True

    def _size_crew(self) -> None:
        size = self._num_threads if self._crew is None else self._crew.size()
        if size != self._num_threads:
            self._num_threads = size
            self._backend.prepare_thread(size)


class LoopDriver:
    """In the event loop, long passes in a thread; see `Driver`. `stop` is called from another thread."""

    def __init__(
        self,
        passes: Passes,
        backend: Backend,
        num_threads: int,
        loop: asyncio.AbstractEventLoop,
        *,
        inline_seconds: float,
    ) -> None:
        """Drive `passes`.

        Args:
            passes: what to drive.
            backend: computes them.
            num_threads: of a matrix product.
            loop: the event loop.
            inline_seconds: a pass that is expected to take longer is computed in a thread.
        """
        self._passes = passes
        self._num_threads = num_threads
        self._loop = loop
        self._inline_seconds = inline_seconds
        self._loop_thread = threading.get_ident()
        self._commands: deque[Command] = deque()
        self._pool = ThreadPoolExecutor(1, "block-engine", backend.prepare_thread, (num_threads,))
        self._next: asyncio.Handle | None = None
        self._is_busy = False  # in a turn, or while a thread computes
        self._stopping = False
        self._is_running = False
        self._ended = threading.Event()
        self.last_progress = time.monotonic()
        self.failure: Future[EngineFailedError] = Future()

    def start(self) -> None:
        """See `Driver`; called in the event loop."""
        torch.set_num_threads(self._num_threads)
        self._is_running = True

    def stop(self) -> None:
        """See `Driver`."""
        self._stopping = True
        if self._is_running:
            self._loop.call_soon_threadsafe(self._turn)
            self._ended.wait()
        self._pool.shutdown()

    def post(self, command: Command, *, at_once: bool = False) -> None:
        """See `Driver`."""
        if self._stopping or not self._is_running:
            raise _stopping()
        if not (self._is_busy or self._passes.has_requests):
            self.last_progress = time.monotonic()
        self._commands.append(command)
        if threading.get_ident() != self._loop_thread:
            self._loop.call_soon_threadsafe(self._turn)
        elif not self._is_busy:
            if at_once:
                self._turn()
            else:
                self._schedule(0)

    def _schedule(self, rounds: int) -> None:
        """Take a turn after the event loop has gone round so many times."""
        if self._next is not None:
            self._next.cancel()
        self._next = (
            self._loop.call_soon(self._schedule, rounds - 1) if rounds else (self._loop.call_soon(self._turn))
        )

    def _turn(self) -> None:
        """Run commands, and a pass: here, or begun in the thread when this returns."""
        if self._is_busy or not self._is_running:
            return
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._is_busy = True
        try:
            while self._commands:
                self._commands.popleft()()
            if self._stopping:
                self._end(_stopped())
                return
            work = self._passes.plan()
            if work is None:
                self._rest(computed=False)
            elif self._passes.pace.expect(work.chunks) <= self._inline_seconds:
                self._passes.compute(work)
                self._finish(work)
            else:
                self._passes.deliver()
                self._pool.submit(self._passes.compute, work).add_done_callback(
                    lambda future: self._loop.call_soon_threadsafe(self._computed, work, future)
                )
        except BaseException as error:
            self._die(error)
            raise

    def _computed(self, work: Pass, future: Future[None]) -> None:
        """A thread has computed a pass."""
        try:
            future.result()
            self._finish(work)
        except BaseException as error:
            self._die(error)
            raise

    def _finish(self, work: Pass) -> None:
        self._passes.finish(work)
        self._rest(computed=True)

    def _rest(self, *, computed: bool) -> None:
        """The end of a turn: when the next one is."""
        self._passes.deliver()
        self._is_busy = False
        self.last_progress = time.monotonic()
        if computed or self._commands or self._stopping:
            self._schedule(SETTLE_ROUNDS)
        elif self._passes.has_requests:
            self._next = self._loop.call_later(IDLE_SECONDS, self._turn)

    def _end(self, reason: ServerStoppingError | EngineFailedError) -> None:
        self._is_running = False
        self._stopping = True
        self._passes.fail_all(reason)
        self._passes.deliver()
        self._ended.set()

    def _die(self, error: BaseException) -> None:
        """Nobody must wait for a driver that has ended."""
        _LOG.critical("the engine ended", exc_info=True)
        self._is_running = False
        self._stopping = True
        for sink in list(self._passes.sinks.values()):
            sink(_ended())
        self._passes.deliver()
        self._ended.set()
        self.failure.set_result(_ended(error))
