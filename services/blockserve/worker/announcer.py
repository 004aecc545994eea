"""Telling the cluster that this worker lives, what it holds, and how busy it is.

The lease is renewed several times within its length. A store that cannot be reached changes nothing here:
requests go on, and the worker announces itself again as soon as the store answers or has forgotten it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from blockserve.common.api.cluster import LoadReport, ResidentSegment
from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.process.tasks import end
from blockserve.common.state.store import Announcement, StateStore
from blockserve.worker.service import WorkerService

log = logging.getLogger(__name__)


class Announcer:
    """Keeps a worker's lease. One event loop.

    Attributes:
        told_at: `time.monotonic()` value of when the shared state last took the lease; 0 before.
    """

    def __init__(
        self,
        service: WorkerService,
        store: StateStore,
        segments: Callable[[], frozenset[ResidentSegment]],
        *,
        lease_seconds: float,
        renew_seconds: float,
    ) -> None:
        """Prepare; `start` makes the worker known.

        Args:
            service: the worker.
            store: shared state.
            segments: what the worker holds now.
            lease_seconds: how long others believe that the worker lives after they heard of it last.
            renew_seconds: how often they hear of it.
        """
        self._service = service
        self._store = store
        self._segments = segments
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._told: tuple[object, ...] = ()
        self.told_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the worker known, and keep it known."""
        await self._tell()
        self._task = asyncio.create_task(self._keep(), name="announcer")

    @property
    def is_known(self) -> bool:
        """Whether the shared state took the lease when it was last told."""
        return bool(self._told)

    async def stop(self) -> None:
        """Let everybody know that the worker is going."""
        if self._task is not None:
            await end(self._task)
            try:
                await self._store.withdraw(self._service.record().id)
            except (StateStoreError, ConfigurationError) as error:
                log.warning("the lease runs out by itself: %s", error)

    def load(self) -> LoadReport:
        """How busy the worker is."""
        report = self._service.engine.report()
        return LoadReport(
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            queued_tokens=report.queued_tokens,
            step_seconds=report.step_seconds,
            step_requests=report.step_requests,
            step_crowding=report.step_crowding,
            prefill_tokens_per_second=report.prefill_tokens_per_second,
            kv_pages_free=report.kv_pages_total - report.kv_pages_used,
            kv_pages_total=report.kv_pages_total,
            block_bytes_used=report.block_bytes,
            kv_token_bytes=report.kv_token_bytes,
            hop_seconds=self._service.hop_seconds(),
            unreadable=self._service.unreadable(),
        )

    async def _keep(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._renew_seconds):
                    await self._service.changed.wait()
            self._service.changed.clear()
            await self._tell()

    async def _tell(self) -> None:
        record, segments = self._service.record(), self._segments()
        lease = self._lease_seconds
        try:
            if self._told == (record, segments) and await self._store.renew(
                record.id, self.load(), lease_seconds=lease
            ):
                self.told_at = time.monotonic()
                return
            await self._store.announce(Announcement(record, self.load(), segments), lease_seconds=lease)
        except (StateStoreError, ConfigurationError) as error:
            if self._told:
                log.warning("the shared state cannot be reached; requests go on: %s", error)
            self._told = ()
            return
        self._told = (record, segments)
        self.told_at = time.monotonic()
