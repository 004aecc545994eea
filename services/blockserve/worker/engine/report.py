"""The report of an engine: a snapshot of its parts for status, metrics and placement."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import torch

from blockserve.common.api.engine import EngineReport, SegmentReport
from blockserve.worker.blocks.chains import LoadedChains
from blockserve.worker.blocks.segments import Segment
from blockserve.worker.compute.counters import SegmentCounters
from blockserve.worker.compute.executor import Executor
from blockserve.worker.engine.kv_memory import KvMemory
from blockserve.worker.engine.passes import Passes
from blockserve.worker.engine.scheduler import Scheduler
from blockserve.worker.kv.pool import KvPool, KvShape
from blockserve.worker.requests.running import RunningRequest


class Reporter:
    """Reads the parts of one engine, in any thread: counters may be one pass apart."""

    def __init__(
        self,
        device: torch.device,
        pools: Mapping[KvShape, KvPool],
        chains: LoadedChains,
        executor: Executor,
        scheduler: Scheduler,
        kv: KvMemory,
        passes: Passes,
    ) -> None:
        """Report on these."""
        self._device = device
        self._pools = pools
        self._chains = chains
        self._executor = executor
        self._scheduler = scheduler
        self._kv = kv
        self._passes = passes

    def report(self, arriving: Collection[RunningRequest], last_progress: float) -> EngineReport:
        """The state now.

        Args:
            arriving: requests that were submitted and that the scheduler has not seen yet.
            last_progress: see `blockserve.worker.engine.drivers.Driver`.
        """
        counters = self._executor.counters
        segments = [one for one in self._executor.segments.ordered if one.id in counters]
        pools = list(self._pools.values())
        pace, exchange = self._passes.pace, self._passes.exchange
        return EngineReport(
            device=str(self._device),
            waiting_requests=len(self._scheduler.waiting) + len(arriving),
            requests_begun_elsewhere=0 if exchange is None else exchange.num_followers,
            running_requests=len(self._scheduler.running),
            passes=self._passes.num_passes,
            kv_pages_total=sum(pool.allocator.num_pages for pool in pools),
            kv_pages_used=sum(pool.num_used for pool in pools),
            kv_pages_cached=sum(pool.prefixes.num_evictable_pages for pool in pools),
            prefix_queried_tokens=self._kv.num_queried,
            prefix_hit_tokens=self._kv.num_hits,
            preemptions=self._scheduler.num_preemptions,
            chain_evictions=self._chains.num_evictions,
            kv_bytes_total=sum(pool.num_bytes for pool in pools),
            block_bytes=self._chains.num_bytes,
            seconds_since_progress=time.monotonic() - last_progress,
            chains=self._chains.reports(),
            segments=tuple(_segment_report(segment, counters[segment.id]) for segment in segments),
            batches=tuple(counters[segment.id].batches.report(segment.id) for segment in segments),
            chain_loads=self._chains.num_loads,
            chain_unloads=self._chains.num_unloads,
            kv_token_bytes=max((pool.shape.token_bytes for pool in pools), default=0),
            queued_tokens=self._queued_tokens(arriving),
            step_seconds=pace.step_seconds,
            step_requests=pace.step_requests,
            step_crowding=pace.step_crowding,
            prefill_tokens_per_second=pace.prefill_tokens_per_second,
        )

    def _queued_tokens(self, arriving: Collection[RunningRequest]) -> int:
        """Tokens that wait for a prompt pass: those of waiting requests, and the rest of begun prompts."""
        waiting = sum(one.num_tokens for one in (*self._scheduler.waiting, *arriving))
        begun = (one.num_uncomputed for one in list(self._scheduler.running))
        return waiting + sum(left for left in begun if left > 1)


def _segment_report(segment: Segment, counters: SegmentCounters) -> SegmentReport:
    return SegmentReport(
        segment_id=segment.id,
        first_position=segment.first,
        num_blocks=len(segment.blocks),
        num_chains=len(segment.chains),
        forward_calls=max(counters.block_calls),
        tokens=counters.tokens,
        sequences=counters.sequences,
        mixed_calls=counters.mixed_calls,
        largest_batch_sequences=counters.largest_batch_sequences,
        largest_batch_chains=counters.largest_batch_chains,
    )
