"""Following the cluster: the router's view of it, and the demand that it tells the controller of.

When the shared state cannot be reached the router goes on from its last view. Workers that die meanwhile are
noticed by their connections.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from blockserve.common.api.cluster import ClusterView
from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.process.tasks import end
from blockserve.common.state.store import StateStore

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often the view is read again when nothing is said to have changed: load reports come every second."""
RETRY_SECONDS = 0.5
"""Pause after a failure."""


class ClusterWatch:
    """Reads the view whenever it changes. One event loop.

    Attributes:
        seen: `time.monotonic()` value of the last reading; 0 before the first.
    """

    def __init__(self, store: StateStore, on_view: Callable[[ClusterView], None]) -> None:
        """Prepare; `start` begins to look.

        Args:
            store: shared state.
            on_view: told of every view that was read.
        """
        self._store = store
        self._on_view = on_view
        self._task: asyncio.Task[None] | None = None
        self.seen = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._watch(), name="cluster watch")

    async def stop(self) -> None:
        """Look no more."""
        await end(self._task)

    async def _watch(self) -> None:
        failed = False
        while True:
            try:
                view = await self._store.view()
                if failed:
                    log.info("the shared state answers again workers=%d", len(view.workers))
                failed = False
                self.seen = time.monotonic()
                self._on_view(view)
                await self._store.wait_change(LOOK_SECONDS)
            except (StateStoreError, ConfigurationError) as error:
                if not failed:
                    log.warning("the shared state cannot be reached; going on from the last view: %s", error)
                failed = True
                await asyncio.sleep(RETRY_SECONDS)
