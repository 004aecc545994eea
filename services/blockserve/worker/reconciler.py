"""Holding what the placement says: missing runs are loaded, runs that are nowhere wanted are let go.

Content counts, not names: a run that was attached for a request stays as long as all in it is assigned,
for whichever chain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from blockserve.common.api.cluster import Assignment, ChainSpan, Placement
from blockserve.common.errors import UNREADABLE, StateStoreError
from blockserve.common.process.tasks import end
from blockserve.common.state.store import StateStore
from blockserve.worker.service import WorkerService
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId, ChainManifest, Link

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often the placement is read when nothing is said to have changed."""
RETRY_SECONDS = 15.0
"""When a run that could not be loaded is tried again."""

Content = set[tuple[int, Link]]
"""Links at their positions."""


class Reconciler:
    """Brings a worker's memory to what the placement wants. One event loop."""

    def __init__(
        self, service: WorkerService, store: StateStore, manifest: Callable[[ChainId], ChainManifest]
    ) -> None:
        """Prepare; `start` begins.

        Args:
            service: the worker.
            store: shared state; one of its own, because it waits for changes.
            manifest: reads a chain (blocking).
        """
        self._service = service
        self._store = store
        self._manifest = manifest
        self._failed: dict[ChainSpan, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the placement."""
        self._task = asyncio.create_task(self._follow(), name="reconciler")

    async def stop(self) -> None:
        """Follow no more."""
        await end(self._task)

    async def _follow(self) -> None:
        while True:
            try:
                await self.reconcile(await self._store.wanted(self._service.record().id))
                await self._store.wait_change(LOOK_SECONDS)
            except StateStoreError:
                await asyncio.sleep(LOOK_SECONDS)
            except BlockzooError:
                log.exception("the placement cannot be followed")
                await asyncio.sleep(LOOK_SECONDS)

    async def reconcile(self, placement: Placement) -> None:
        """Load and let go until the worker holds what a placement says; nothing when it does not name it."""
        wanted = placement.workers.get(self._service.record().id)
        if wanted is None or self._service.is_draining:
            return
        try:
            await self._let_go(await asyncio.to_thread(self._content, wanted))
        except UNREADABLE as error:
            # One chain that cannot be read says nothing about the others, which are loaded below.
            log.warning("nothing is let go: %s", error)
        held = {(chain.chain, chain.run): chain for chain in self._service.engine.report().chains}
        for one in wanted:
            span = ChainSpan(one.chain, one.run)
            known = held.get((one.chain, one.run))
            if known is None or known.pinned != one.pinned:
                await self._load(span, one.pinned)

    async def _load(self, span: ChainSpan, pinned: bool) -> None:
        now = time.monotonic()
        if self._failed.get(span, 0.0) > now:
            return
        try:
            await self._service.load(span, pinned)
        except BlockzooError as error:
            self._failed[span] = now + RETRY_SECONDS
            log.error("not loaded chain=%s from=%d: %s", span.chain[:12], span.run.first, error)
            return
        self._failed.pop(span, None)
        log.info(
            "loaded chain=%s run=%d:%d seconds=%.3f",
            span.chain[:12],
            span.run.first,
            span.run.end,
            time.monotonic() - now,
        )

    async def _let_go(self, content: Content) -> None:
        for chain in self._service.engine.report().chains:
            if chain.run is None or chain.running_requests:
                continue
            links = (await asyncio.to_thread(self._manifest, chain.chain)).links
            held = {(position, links[position]) for position in range(chain.run.first, chain.run.end)}
            if not held <= content:
                log.info("let go chain=%s run=%d:%d", chain.chain[:12], chain.run.first, chain.run.end)
                await self._service.unload(ChainSpan(chain.chain, chain.run))

    def _content(self, wanted: Iterable[Assignment]) -> Content:
        content: Content = set()
        for one in wanted:
            links = self._manifest(one.chain).links
            content.update((position, links[position]) for position in range(one.run.first, one.run.end))
        return content
