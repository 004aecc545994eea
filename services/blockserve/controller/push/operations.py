"""Operations on the zoo that take long: run in a thread of their own, told about while they run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from blockserve.common.api.push import Step
from blockzoo.progress import Progress

T = TypeVar("T")

TELL_EVERY_SECONDS = 0.2
"""A bar that moves five times a second looks smooth."""


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """What an operation returned."""

    result: T


class AbandonedError(Exception):
    """Nobody waits for the operation any more."""


class SharedProgress:
    """Progress written by one thread and read by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step = Step("", 0, 0)
        self.is_abandoned = False

    def start(self, task: str, total_bytes: int) -> None:
        """See `Progress`."""
        with self._lock:
            self._step = Step(task, total_bytes, 0)

    def advance(self, num_bytes: int) -> None:
        """See `Progress`; ends an operation that was abandoned."""
        if self.is_abandoned:
            raise AbandonedError
        with self._lock:
            step = self._step
            self._step = Step(step.task, step.total_bytes, step.done_bytes + num_bytes)

    def finish(self) -> None:
        """See `Progress`."""

    def read(self) -> Step:
        """How far it is now."""
        with self._lock:
            return self._step


async def run_operation(operation: Callable[[Progress], T]) -> AsyncGenerator[Step | Done[T], None]:
    """Run a blocking operation; yield how far it is now and then, and last what it returned.

    Closing the generator lets the operation end at its next step. The thread does not keep the process
    from ending: every operation on a zoo may be cut off anywhere.
    """
    loop = asyncio.get_running_loop()
    progress = SharedProgress()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result: T | None = None
        caught: BaseException | None = None
        try:
            result = operation(progress)
        except BaseException as error:  # noqa: BLE001 - handed over to whoever waits
            caught = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, caught)

    threading.Thread(target=work, name="blockzoo-operation", daemon=True).start()
    try:
        while not future.done():
            await asyncio.wait({future}, timeout=TELL_EVERY_SECONDS)
            yield progress.read()
        yield Done(future.result())
    finally:
        progress.is_abandoned = True
        future.cancel()
