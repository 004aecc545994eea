"""How many requests are in progress, and how they end when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blockserve.common.errors import QueueFullError, ServerStoppingError


@dataclass(eq=False, slots=True)
class _Ticket:
    task: asyncio.Task[object]
    evicted: bool = False


class Admission:
    """Counts requests in; refuses one too many, and all once the server stops. One event loop."""

    def __init__(self, max_requests: int, retry_after: float) -> None:
        """Allow `max_requests` at once; others wait `retry_after` seconds if `Router` knows no better."""
        self._max_requests = max_requests
        self._retry_after = retry_after
        self._tickets: set[_Ticket] = set()
        self._places = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._stopping = False

    @property
    def num_requests(self) -> int:
        """Requests in progress; a call for several answers counts as so many."""
        return self._places

    @contextmanager
    def admit(self, places: int = 1) -> Iterator[None]:
        """Hold places for as long as the block runs, in the task that runs it.

        Raises:
            QueueFullError: they are not free; more than there are can be had while nobody else is here.
            ServerStoppingError: the server takes no new requests, or stops before the block ends.
        """
        if self._stopping:
            raise self._stopping_error()
        if self._places + places > self._max_requests and (self._places or places == 1):
            raise QueueFullError(
                f"{self._places} requests are in progress, the maximum of this server",
                retry_after=self._retry_after,
                hint=f"Try again in {self._retry_after:.1f} s.",
            )
        task = asyncio.current_task()
        assert task is not None
        ticket = _Ticket(task)
        self._tickets.add(ticket)
        self._places += places
        self._empty.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not ticket.evicted:
                raise
            task.uncancel()
            raise self._stopping_error() from None
        finally:
            self._tickets.discard(ticket)
            self._places -= places
            if not self._tickets:
                self._empty.set()

    async def drain(self, seconds: float) -> int:
        """Refuse new requests, give those in progress this long, then end them.

        Returns:
            How many had to be ended early.
        """
        self._stopping = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            evicted = self.evict()
            await self._empty.wait()
            return evicted
        return 0

    def evict(self) -> int:
        """End all requests in progress with ServerStoppingError; says how many."""
        self._stopping = True
        for ticket in self._tickets:
            if not ticket.evicted:
                ticket.evicted = True
                ticket.task.cancel()
        return len(self._tickets)

    def _stopping_error(self) -> ServerStoppingError:
        return ServerStoppingError(
            "the server is stopping",
            retry_after=self._retry_after,
            hint="Send the request to another server, or send it again after the restart.",
        )
