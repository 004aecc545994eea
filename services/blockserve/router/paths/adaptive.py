"""Adaptive assembly: a variant's request on an approved equivalent while its own blocks are absent or busy.

BlockLLM's first claim (arXiv 2404.18322): chains are put together per request, from blocks that were measured
to be equivalent. Here only where an operator approved the measured pair for this variant, and the caller
allows it for this call. What ran is named in the answer; who allows nothing always gets the exact chain.

One substitute at a time: what two do together was not measured. Where it stands in for every difference of
two variants, the other variant's chain runs; else one that is neither's, which `approve` stored in the zoo.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from blockserve.common.api.calls import CallField
from blockserve.common.api.engine import EngineRequest
from blockserve.common.errors import ResumeError
from blockserve.common.settings import Section, setting
from blockzoo.equivalence import Approvals, Positions, Substitute
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)


class AdaptiveConfig(Section):
    """When an approved equivalent runs instead of a variant's own blocks."""

    enabled: bool = setting(
        True,
        "Use approved equivalents for callers that allow them.",
        reason="Equivalents are only used with an approval and if the caller allows them.",
    )
    margin: float = setting(
        0.5,
        "Minimum gain: how much longer the exact chain must be expected to take, as a share of its own time.",
        reason="Estimates are rough; a small gain is not worth an approximate answer.",
        ge=0,
    )
    min_seconds: float = setting(
        0.1,
        "Minimum gain: how much longer the exact chain must be expected to take.",
        unit="seconds",
        reason="A smaller gain is not noticed.",
        ge=0,
    )
    refresh_seconds: float = setting(
        0.5,
        "Maximum age of the list of approvals when one is used.",
        unit="seconds",
        reason="A revocation takes effect within that time; reading them takes milliseconds.",
        ge=0,
    )


class Estimator(Protocol):
    """Says how long chains would take; see `blockserve.router.paths.chooser`."""

    async def prepare(self, chain: ChainId) -> None:
        """Read what estimating a chain takes (ManifestNotFoundError)."""
        ...

    async def prepare_spliced(
        self, chain: ChainId, original: ChainId, substitute: ChainId, shift: int
    ) -> None:
        """Read what estimating a chain takes that has a run of a second in the place of one of a first.

        Args:
            chain: the chain that runs.
            original: the first.
            substitute: the second.
            shift: how much further back the run is in the second.

        Raises:
            ManifestNotFoundError: one of them is not in the zoo.
        """
        ...

    def estimate(self, request: EngineRequest, *, idle: bool = False) -> float | None:
        """Expected seconds until a request is answered; None when no live workers hold its chain.

        Args:
            request: what to answer.
            idle: reckon as though the workers had nothing else to do.
        """
        ...


class AdaptiveAssembly:
    """Chooses between a variant's chain and its approved equivalents. One event loop."""

    def __init__(
        self,
        approvals: Approvals,
        estimator: Estimator,
        config: AdaptiveConfig,
        *,
        on_substituted: Callable[[ChainId], None] = lambda _: None,
    ) -> None:
        """Join the parts.

        Args:
            approvals: of the zoo.
            estimator: says how long chains would take.
            config: when to switch.
            on_substituted: called with the variant's own chain when another one runs: it is still the one
                that is asked for.
        """
        self._approvals = approvals
        self._estimator = estimator
        self._config = config
        self._refreshed = time.monotonic()
        self._refreshing = asyncio.Lock()
        self._on_substituted = on_substituted

    async def choose(self, request: EngineRequest, variant: str) -> Substitute | None:
        """What to run a request on instead of its chain; None for the chain itself.

        Args:
            request: as planned, on the variant's own chain.
            variant: NAME@N.
        """
        if not self._config.enabled or not self._candidates(request.chain, variant):
            return None
        await self._estimator.prepare(request.chain)
        exact = self._estimator.estimate(request)
        unloaded = self._estimator.estimate(request, idle=True)
        if unloaded is not None and not self._is_worth(exact, unloaded):
            return None  # others may be faster, but not because anybody queues there
        best: tuple[float, Substitute] | None = None
        for positions, one in self._candidates(request.chain, variant):
            try:
                await self._prepare(request.chain, positions, one)
            except BlockzooError:
                continue  # its chain was deleted by a gc that does not know approvals
            seconds = self._estimator.estimate(replace(request, chain=one.result))
            if seconds is not None and self._is_worth(exact, seconds) and (best is None or seconds < best[0]):
                best = seconds, one
        if best is None:
            return None
        await self._refresh()
        if best[1] not in [one for _, one in self._candidates(request.chain, variant)]:
            return None
        self._on_substituted(request.chain)
        return best[1]

    async def resume(self, request: EngineRequest, variant: str, chain: ChainId) -> Substitute:
        """What an answer began on that is to be taken up again.

        Raises:
            ResumeError: it is not approved (any more).
            ManifestNotFoundError: its chain is not in the zoo.
        """
        await self._refresh()
        for positions, one in self._candidates(request.chain, variant):
            if one.result == chain:
                await self._prepare(request.chain, positions, one)
                return one
        raise ResumeError(
            f"the answer began on chain {chain}, which may no longer stand in for {variant}",
            hint="Ask again from the start.",
            field=CallField.RESUME_CHAIN,
        )

    def _candidates(self, chain: ChainId, variant: str) -> list[tuple[Positions, Substitute]]:
        found = self._approvals.substitutes(chain, variant)
        return [(positions, one) for positions, group in found.items() for one in group]

    async def _prepare(self, chain: ChainId, positions: Positions, one: Substitute) -> None:
        if one.result == one.chain:
            await self._estimator.prepare(one.result)
        else:
            shift = one.positions.first - positions.first
            await self._estimator.prepare_spliced(one.result, chain, one.chain, shift)

    def _is_worth(self, exact: float | None, other: float) -> bool:
        if exact is None:
            return True
        return exact > other * (1 + self._config.margin) and exact - other > self._config.min_seconds

    async def _refresh(self) -> None:
        async with self._refreshing:
            if time.monotonic() - self._refreshed < self._config.refresh_seconds:
                return
            await asyncio.to_thread(self._approvals.refresh)
            self._refreshed = time.monotonic()

    async def keep_fresh(self) -> None:
        """Take notice of new approvals, for as long as this runs."""
        while True:
            await asyncio.sleep(max(self._config.refresh_seconds, 0.1))
            try:
                await self._refresh()
            except BlockzooError as error:
                log.warning("approvals cannot be read; those known stay: %s", error)
