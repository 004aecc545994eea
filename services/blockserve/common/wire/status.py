"""What a server says of itself, to messages and back; pure. See `blockserve.common.wire.inference`."""

from __future__ import annotations

from blockproto.v1 import admin_pb2
from blockserve.common.api.engine import SegmentReport
from blockserve.common.api.status import ClusterStatus, LoadedChain, ResidentRun, ServerStatus, WorkerStatus
from blockserve.common.wire.call_trace import running_path_from_message, running_path_to_message
from blockserve.common.wire.inference import fields_of

_STATUS_FIELDS = (
    "version",
    "uptime_seconds",
    "zoo_url",
    "device",
    "waiting_requests",
    "running_requests",
    "passes",
    "kv_pages_total",
    "kv_pages_used",
    "kv_bytes_total",
    "block_bytes",
    "kv_pages_cached",
    "prefix_queried_tokens",
    "prefix_hit_tokens",
    "preemptions",
    "chain_evictions",
)
_CHAIN_FIELDS = ("chain_digest", "running_requests", "private_bytes", "total_bytes", "pinned")
_CLUSTER_FIELDS = ("placement_version", "failovers")
_RUN_FIELDS = ("segment_digest", "first_position", "num_blocks")
_WORKER_FIELDS = (
    "worker_id",
    "name",
    "address",
    "host",
    "state",
    "waiting_requests",
    "running_requests",
    "queued_tokens",
    "step_seconds",
    "kv_pages_free",
    "kv_pages_total",
    "block_bytes",
    "block_bytes_limit",
)
_SEGMENT_FIELDS = (
    "segment_id",
    "first_position",
    "num_blocks",
    "num_chains",
    "forward_calls",
    "tokens",
    "sequences",
    "mixed_calls",
    "largest_batch_sequences",
    "largest_batch_chains",
)


def status_to_message(status: ServerStatus) -> admin_pb2.GetStatusResponse:
    """A server's status for the wire."""
    return admin_pb2.GetStatusResponse(
        chains=[
            admin_pb2.LoadedChain(models=chain.models, **fields_of(chain, _CHAIN_FIELDS))
            for chain in status.chains
        ],
        segments=[
            admin_pb2.SegmentStatus(**fields_of(segment, _SEGMENT_FIELDS)) for segment in status.segments
        ],
        cluster=None if status.cluster is None else _cluster_to_message(status.cluster),
        **fields_of(status, _STATUS_FIELDS),
    )


def status_from_message(message: admin_pb2.GetStatusResponse) -> ServerStatus:
    """The inverse of `status_to_message`."""
    return ServerStatus(
        chains=tuple(
            LoadedChain(models=tuple(chain.models), **fields_of(chain, _CHAIN_FIELDS))
            for chain in message.chains
        ),
        segments=tuple(SegmentReport(**fields_of(segment, _SEGMENT_FIELDS)) for segment in message.segments),
        cluster=_cluster_from_message(message.cluster) if message.HasField("cluster") else None,
        **fields_of(message, _STATUS_FIELDS),
    )


def _cluster_to_message(cluster: ClusterStatus) -> admin_pb2.ClusterStatus:
    return admin_pb2.ClusterStatus(
        paths=[running_path_to_message(path) for path in cluster.paths],
        workers=[
            admin_pb2.WorkerStatus(
                segments=[admin_pb2.ResidentRun(**fields_of(run, _RUN_FIELDS)) for run in worker.segments],
                **fields_of(worker, _WORKER_FIELDS),
            )
            for worker in cluster.workers
        ],
        **fields_of(cluster, _CLUSTER_FIELDS),
    )


def _cluster_from_message(message: admin_pb2.ClusterStatus) -> ClusterStatus:
    return ClusterStatus(
        paths=tuple(running_path_from_message(path) for path in message.paths),
        workers=tuple(
            WorkerStatus(
                segments=tuple(ResidentRun(**fields_of(run, _RUN_FIELDS)) for run in worker.segments),
                **fields_of(worker, _WORKER_FIELDS),
            )
            for worker in message.workers
        ),
        **fields_of(message, _CLUSTER_FIELDS),
    )
