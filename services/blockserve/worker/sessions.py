"""The requests of one router: started, told of their tokens many at a time, cancelled when it goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.errors import LEAVING, EngineFailedError, PathBrokenError
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.requests.running import Outcome, RunningRequest
from blockzoo.errors import BlockzooError

log = logging.getLogger(__name__)

Progress = tuple[int, Outcome]
"""Number of a request, and its new tokens or why it failed."""


class RouterSession:
    """One router's requests at this worker. One event loop."""

    def __init__(self, engine: BlockEngine, ensure: Callable[[EngineRequest], Awaitable[None]]) -> None:
        """Begin without requests.

        Args:
            engine: runs them.
            ensure: has what a request needs of this worker in memory, or raises.
        """
        self._engine = engine
        self._ensure = ensure
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, RunningRequest] = {}
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._news: list[Progress] = []
        self._wake = asyncio.Event()
        self._ended = False

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._running) + len(self._starting)

    def start(self, number: int, request: EngineRequest) -> None:
        """Run a request; its outcomes come from `progress`."""
        task = asyncio.create_task(self._start(number, request))
        self._starting[number] = task
        task.add_done_callback(lambda _: self._starting.pop(number, None))

    def refuse(self, number: int, error: BlockzooError) -> None:
        """A request that cannot be read fails; the others go on."""
        self._take(number, error)

    def cancel(self, number: int) -> None:
        """Stop a request; one that has ended is left alone."""
        if (task := self._starting.get(number)) is not None:
            task.cancel()
        if (running := self._running.pop(number, None)) is not None:
            self._engine.cancel(running)

    def give_back(self, reason: PathBrokenError) -> None:
        """End every request with an error that has the router let it go on elsewhere."""
        for number in [*self._running, *self._starting]:
            self.cancel(number)
            self._take(number, reason)

    def close(self) -> None:
        """Cancel everything: nobody listens any more."""
        for number in [*self._running, *self._starting]:
            self.cancel(number)

    async def progress(self) -> AsyncIterator[Sequence[Progress]]:
        """What is new, a batch at a time, until `end`."""
        while not self._ended:
            await self._wake.wait()
            self._wake.clear()
            if self._news:
                news, self._news = self._news, []
                yield news

    def end(self) -> None:
        """The router says nothing more: `progress` ends."""
        self._ended = True
        self._wake.set()

    async def _start(self, number: int, request: EngineRequest) -> None:
        try:
            await self._ensure(request)
            sink = self._engine.mail(self._loop, partial(self._take, number))
            self._running[number] = self._engine.submit(request, sink)
        except BlockzooError as error:
            self._take(number, error)
        except LEAVING:
            raise
        except BaseException as error:
            log.exception("request %s could not be started", request.request_id)
            self._take(number, EngineFailedError(f"the request could not be started: {error!r}"))

    def _take(self, number: int, outcome: Outcome) -> None:
        if isinstance(outcome, BlockzooError) or outcome[-1].finish is not None:
            running = self._running.pop(number, None)
        else:
            running = self._running.get(number)
        if running is not None and not isinstance(outcome, BlockzooError):
            outcome = [_timed(event, running) for event in outcome]
        self._news.append((number, outcome))
        self._wake.set()


def _timed(event: TokenEvent, running: RunningRequest) -> TokenEvent:
    """The first token also tells how long the request waited."""
    is_first = event.index == len(running.request.output)
    return replace(event, timing=running.timing) if is_first else event
