"""Telling the cluster that this worker lives, what it holds, and how busy it is.

The lease is renewed several times within its length; whoever has it has the worker's name as well. A store
that cannot be reached changes nothing here: requests go on, and the worker announces itself again as soon as
the store answers or has forgotten it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from blockserve.common.api.cluster import LoadReport, ResidentSegment, WorkerState
from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.process.tasks import end
from blockserve.common.rpc.channel import Credentials
from blockserve.common.state.store import Announcement, StateStore
from blockserve.worker.peers.names import announce_alone
from blockserve.worker.service import WorkerService

log = logging.getLogger(__name__)


class Announcer:
    """Keeps a worker's lease. One event loop.

    Attributes:
        replaced: done, with the reason, once another live worker has this one's name.
        told_at: `time.monotonic()` value of when the shared state last took the lease; 0 before.
    """

    def __init__(
        self,
        service: WorkerService,
        store: StateStore,
        segments: Callable[[], frozenset[ResidentSegment]],
        credentials: Credentials,
        *,
        lease_seconds: float,
        renew_seconds: float,
    ) -> None:
        """Prepare; `start` makes the worker known.

        Args:
            service: the worker.
            store: shared state.
            segments: what the worker holds now.
            credentials: for the question to another worker of the name.
            lease_seconds: how long others believe that the worker lives after they heard of it last.
            renew_seconds: how often they hear of it.
        """
        self._service = service
        self._store = store
        self._segments = segments
        self._credentials = credentials
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._told: tuple[object, ...] = ()
        self.told_at = 0.0
        self.replaced: asyncio.Future[ConfigurationError] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Make the worker known, and keep it known.

        Raises:
            ConfigurationError: another worker answers to the name.
        """
        await self._tell(is_start=True)
        if self.replaced.done():
            raise self.replaced.result()
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
        while not self.replaced.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._renew_seconds):
                    await self._service.changed.wait()
            self._service.changed.clear()
            await self._tell()

    async def _tell(self, *, is_start: bool = False) -> None:
        record, segments = self._service.record(), self._segments()
        lease = self._lease_seconds
        try:
            if self._told == (record, segments) and await self._store.renew(
                record.id, self.load(), lease_seconds=lease
            ):
                self.told_at = time.monotonic()
                return
            if not await self._announce(Announcement(record, self.load(), segments), is_start=is_start):
                self._told = ()
                return
        except (StateStoreError, ConfigurationError) as error:
            if self._told:
                log.warning("the shared state cannot be reached; requests go on: %s", error)
            self._told = ()
            return
        self._told = (record, segments)
        self.told_at = time.monotonic()

    async def _announce(self, announcement: Announcement, *, is_start: bool) -> bool:
        """Whether it is announced; another worker may have the name."""
        lease = self._lease_seconds
        if announcement.record.state is WorkerState.DRAINING:  # another one may have followed it already
            await self._store.announce(announcement, lease_seconds=lease)
            return True
        taken = await announce_alone(
            self._store, announcement, self._credentials, lease_seconds=lease, is_start=is_start
        )
        if taken is not None:
            self.replaced.set_result(taken)
        return taken is None
