"""What operators ask of a running server: load and unload variants, drain workers, trace calls, status.

Free of any wire format, like `blockserve.router.service`, which answers the callers.
"""

from __future__ import annotations

import time
from typing import Protocol

from blockserve.common.api.call_trace import CallTrace
from blockserve.common.api.engine import ChainReport, Engine
from blockserve.common.api.status import LoadedChain, ServerStatus
from blockserve.common.errors import WorkerNotFoundError
from blockserve.common.placement.wishes import WishKeeper
from blockserve.router.cluster.report import KnowsCluster, describe
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.loading import ChainLoader
from blockserve.router.traces.book import TraceBook


class WorkerOperator(Protocol):
    """Acts on single workers of a cluster."""

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool) -> int:
        """Have a worker take no new requests; how many it gave back (WorkerNotFoundError)."""
        ...


class Operations:
    """The operators' side of a server. One event loop, shared with `blockserve.router.service.Router`."""

    def __init__(
        self,
        catalog: VariantCatalog,
        engine: Engine,
        loader: ChainLoader,
        traces: TraceBook,
        *,
        version: str = "",
        operator: WorkerOperator | None = None,
        wishes: WishKeeper | None = None,
    ) -> None:
        """Put the parts together; those without a default are the router's.

        Args:
            catalog: where variants are looked up.
            engine: what runs requests.
            loader: brings chains into memory.
            traces: where the time of calls went.
            version: of the program, for `status`.
            operator: acts on workers; None where there are none.
            wishes: keeps what is to stay loaded in a cluster; None where there is one process.
        """
        self._catalog = catalog
        self._engine = engine
        self._loader = loader
        self._traces = traces
        self._version = version
        self._operator = operator
        self._wishes = wishes
        self._started = time.monotonic()

    async def load(self, ref: str, *, pinned: bool | None = None) -> tuple[str, float]:
        """Bring a variant's blocks into memory; its chain's digest and the seconds it took.

        Args:
            ref: `name` or `name@version`.
            pinned: whether they must stay when others need room; None leaves that as it is.
        """
        started = time.monotonic()
        variant = await self._catalog.get(ref)
        if self._wishes is not None and pinned is not None:
            await self._wishes.wish(ref, pinned=pinned)
        await self._loader.ensure(variant.record.chain)
        if pinned is not None:
            await self._engine.load(variant.record.chain, pinned=pinned)
        return variant.record.chain, time.monotonic() - started

    async def unload(self, ref: str) -> str:
        """Let go of a variant's blocks once its requests have ended; its chain's digest."""
        variant = await self._catalog.get(ref)
        if self._wishes is not None and "@" not in ref:
            await self._wishes.wish(ref, pinned=False)
        await self._engine.unload(variant.record.chain)
        return variant.record.chain

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool = False) -> int:
        """Have a worker take no new requests; how many it gave back.

        Raises:
            WorkerNotFoundError: there is none of this name, or this server is one process.
        """
        if self._operator is None:
            raise WorkerNotFoundError(
                f"there is no worker {worker!r}: this server is one process", hint="Stop the server instead."
            )
        return await self._operator.drain_worker(worker, seconds, resume=resume)

    async def trace(self, request_id: str) -> tuple[CallTrace, ...]:
        """Where the time of a request went (RequestNotFoundError); see `TraceBook.trace`."""
        return await self._traces.trace(request_id, self._engine)

    async def status(self) -> ServerStatus:
        """What is loaded, the segments, the queues and the use of KV pages."""
        report, refs = self._engine.report(), await self._catalog.refs_by_chain()
        return ServerStatus(
            version=self._version,
            uptime_seconds=time.monotonic() - self._started,
            zoo_url=self._catalog.zoo_url,
            device=report.device,
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            passes=report.passes,
            kv_pages_total=report.kv_pages_total,
            kv_pages_used=report.kv_pages_used,
            kv_bytes_total=report.kv_bytes_total,
            block_bytes=report.block_bytes,
            kv_pages_cached=report.kv_pages_cached,
            prefix_queried_tokens=report.prefix_queried_tokens,
            prefix_hit_tokens=report.prefix_hit_tokens,
            preemptions=report.preemptions,
            chain_evictions=report.chain_evictions,
            chains=tuple(_loaded(chain, refs.get(chain.chain, ())) for chain in report.chains),
            segments=report.segments,
            cluster=describe(self._engine) if isinstance(self._engine, KnowsCluster) else None,
        )


def _loaded(chain: ChainReport, refs: tuple[str, ...]) -> LoadedChain:
    return LoadedChain(
        chain_digest=chain.chain,
        models=refs,
        running_requests=chain.running_requests,
        private_bytes=chain.private_bytes,
        total_bytes=chain.total_bytes,
        pinned=chain.pinned,
    )
