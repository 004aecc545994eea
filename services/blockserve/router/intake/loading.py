"""Chains into memory on first use, each once however many requests wait for it.

Loading ahead of the first request is the same call without a request: `AdminService.LoadModel`, or
`preload` in the settings.
"""

from __future__ import annotations

import asyncio
import logging
import time

from blockserve.common.api.engine import Engine
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)


class ChainLoader:
    """Shares one `Engine.load` among all requests that need the chain. One event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loads: dict[ChainId, asyncio.Task[None]] = {}

    async def ensure(self, chain: ChainId) -> None:
        """Return once the chain is in memory.

        A caller that gives up does not end the load: others may wait for it, and the next request will.

        Raises:
            CorruptBlobError, MemoryBudgetError: as `Engine.load`; the next call tries again.
        """
        if self._engine.is_loaded(chain):
            return
        task = self._loads.get(chain)
        if task is None:
            task = self._loads[chain] = asyncio.create_task(self._load(chain))
            task.add_done_callback(_look_at_result)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Give up loads in progress."""
        tasks = list(self._loads.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, chain: ChainId) -> None:
        started = time.monotonic()
        try:
            await self._engine.load(chain)
        finally:
            del self._loads[chain]
        log.info("chain loaded chain=%s seconds=%.3f", chain[:12], time.monotonic() - started)


def _look_at_result(task: asyncio.Task[None]) -> None:
    """Log a failed load even when everybody who waited has left."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("chain not loaded: %s", error)
