"""The figures of all workers: as one engine's, and one by one; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from blockserve.common.api.cluster import ClusterView, ResidentSegment, WorkerView
from blockserve.common.api.engine import EngineReport
from blockserve.common.api.status import ClusterStatus, ResidentRun, RunningPath, RunningStep, WorkerStatus
from blockserve.router.traces.journeys import NamedStep


@runtime_checkable
class KnowsCluster(Protocol):
    """An engine that is a cluster; that of a single process is none."""

    @property
    def view(self) -> ClusterView:
        """The cluster as last seen."""
        ...

    @property
    def num_failovers(self) -> int:
        """How often a request went on along another path."""
        ...

    def running_paths(self) -> Counter[tuple[NamedStep, ...]]:
        """How many requests run along each path."""
        ...


def describe(cluster: KnowsCluster) -> ClusterStatus:
    """What is known of every worker."""
    view = cluster.view
    workers = sorted(view.workers.values(), key=lambda worker: (worker.record.name, worker.record.id))
    return ClusterStatus(
        tuple(_worker(worker) for worker in workers),
        view.placement.version,
        cluster.num_failovers,
        tuple(_path(steps, requests) for steps, requests in cluster.running_paths().most_common()),
    )


def _path(steps: Sequence[NamedStep], requests: int) -> RunningPath:
    named = (RunningStep(step.worker, name, step.run.first, len(step.run)) for step, name in steps)
    return RunningPath(tuple(named), requests)


def _worker(worker: WorkerView) -> WorkerStatus:
    record, load = worker.record, worker.load
    return WorkerStatus(
        worker_id=record.id,
        name=record.name,
        address=record.address,
        host=record.host,
        state=record.state.value,
        waiting_requests=load.waiting_requests,
        running_requests=load.running_requests,
        queued_tokens=load.queued_tokens,
        step_seconds=load.step_seconds,
        kv_pages_free=load.kv_pages_free,
        kv_pages_total=load.kv_pages_total,
        block_bytes=load.block_bytes_used,
        block_bytes_limit=record.block_bytes,
        segments=tuple(_run(segment) for segment in sorted(worker.segments, key=_place)),
    )


def _place(segment: ResidentSegment) -> tuple[int, int, str]:
    return segment.run.first, segment.run.end, segment.digest


def _run(segment: ResidentSegment) -> ResidentRun:
    return ResidentRun(segment.digest, segment.run.first, len(segment.run))


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
