"""The figures of all workers as one engine's; pure."""

from __future__ import annotations

from blockserve.common.cluster import ClusterView
from blockserve.common.engine_api import EngineReport


def summarise(view: ClusterView) -> EngineReport:
    """One report for a cluster: sums of what its workers said last."""
    loads = [worker.load for worker in view.workers.values()]
    total = sum(load.kv_pages_total for load in loads)
    return EngineReport(
        device=f"{len(loads)} workers",
        waiting_requests=sum(load.waiting_requests for load in loads),
        running_requests=max((load.running_requests for load in loads), default=0),
        passes=0,
        kv_pages_total=total,
        kv_pages_used=total - sum(load.kv_pages_free for load in loads),
        kv_bytes_total=0,
        block_bytes=sum(load.block_bytes_used for load in loads),
        seconds_since_progress=0.0,
        queued_tokens=sum(load.queued_tokens for load in loads),
        step_seconds=max((load.step_seconds for load in loads), default=0.0),
        prefill_tokens_per_second=max((load.prefill_tokens_per_second for load in loads), default=0.0),
    )
