"""What this router's callers ask for, told to the controller through the shared state.

The controller places what is asked for: a variant that no worker holds is loaded because a request wants it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from blockserve.common.errors import ConfigurationError, StateStoreError
from blockserve.common.process.tasks import end
from blockserve.common.state.store import StateStore
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)

TELL_SECONDS = 2.0
"""How often demand is reported."""
KEEP_SECONDS = 600.0
"""How long a chain without requests is still reported: placement should not follow every pause."""
SMOOTHING = 0.2
"""Weight of the newest interval in the rates."""


class DemandTeller:
    """Counts requests by chain and tells their rates. One event loop. See `engine.Loader`."""

    def __init__(
        self, store: StateStore, router: str, *, evicted: Callable[[], Collection[ChainId]] = tuple
    ) -> None:
        """Prepare; `start` begins to tell.

        Args:
            store: shared state.
            router: names this process.
            evicted: chains that operators had unloaded since it was called last (blocking); what was asked
                for before is forgotten.
        """
        self._evicted = evicted
        self._store = store
        self._router = router
        self._counts: dict[ChainId, int] = {}
        self._rates: dict[ChainId, float] = {}
        self._asked: dict[ChainId, float] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell."""
        self._task = asyncio.create_task(self._run(), name="demand")

    async def stop(self) -> None:
        """Tell no more; what was told runs out by itself."""
        await end(self._task)

    def note(self, chain: ChainId) -> None:
        """One more request."""
        self._counts[chain] = self._counts.get(chain, 0) + 1
        self._asked[chain] = time.monotonic()

    async def load(self, chain: ChainId, *, pinned: bool | None = None) -> None:
        """Ask for a chain that no workers hold; returns at once."""
        del pinned
        if chain not in self._rates:
            self.note(chain)
            self._wake.set()

    async def unload(self, chain: ChainId) -> None:
        """Ask for a chain no more."""
        self._forget(chain)
        self._wake.set()

    def _forget(self, chain: ChainId) -> None:
        for known in (self._counts, self._rates, self._asked):
            known.pop(chain, None)

    async def _run(self) -> None:
        told, failed = time.monotonic(), False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TELL_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            for chain in await asyncio.to_thread(self._evicted):
                self._forget(chain)
            now = time.monotonic()
            self._update(max(now - told, 1e-3))
            told = now
            failed = await self._tell(failed)

    async def _tell(self, failed: bool) -> bool:
        """Tell; says whether that failed, and logs it when it did not the last time."""
        try:
            await self._store.tell_demand(self._router, self._rates, ttl_seconds=5 * TELL_SECONDS)
        except (StateStoreError, ConfigurationError) as error:
            if not failed:
                log.warning("demand cannot be reported: %s", error)
            return True
        return False

    def _update(self, seconds: float) -> None:
        """Fold the counts of an interval into the rates; requests/s."""
        now = time.monotonic()
        weight = min(1.0, SMOOTHING * seconds / TELL_SECONDS)
        for chain in list(self._asked):
            if now - self._asked[chain] > KEEP_SECONDS:
                del self._asked[chain]
                self._rates.pop(chain, None)
                continue
            newest = self._counts.get(chain, 0) / max(seconds, TELL_SECONDS)
            known = self._rates.get(chain)
            self._rates[chain] = newest if known is None else known + weight * (newest - known)
        self._counts.clear()
