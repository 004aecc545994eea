"""What a server says of itself and of its cluster. Frozen values, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from blockserve.common.api.engine import SegmentReport


@dataclass(frozen=True, slots=True)
class LoadedChain:
    """A chain in memory.

    Attributes:
        chain_digest: the chain.
        models: the variants (`name@version`) that run on it.
        running_requests: how many do now.
        private_bytes: bytes that no other loaded chain uses.
        total_bytes: bytes of all its blocks.
        pinned: stays when others need room.
    """

    chain_digest: str
    models: tuple[str, ...]
    running_requests: int
    private_bytes: int
    total_bytes: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class ResidentRun:
    """A run of a chain's blocks in a worker's memory.

    Attributes:
        segment_digest: what the run is; workers that have equal ones are replicas.
        first_position: of the run, in the chain; 0 is the embedding.
        num_blocks: length of the run.
    """

    segment_digest: str
    first_position: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker whose lease is alive, as the router last heard of it.

    Attributes:
        worker_id: of one life of the process.
        name: stable over restarts.
        address: where other processes of the cluster reach it.
        host: machine it runs on.
        state: "starting", "ready" or "draining".
        waiting_requests, running_requests: spans of requests it has.
        queued_tokens: tokens that wait to be computed.
        step_seconds: time of one pass, a moving mean; 0 while nothing was measured.
        kv_pages_free, kv_pages_total: of all pools.
        block_bytes: bytes of blocks in memory.
        block_bytes_limit: most it may hold; 0 when it sets no bound.
        segments: what is in its memory, by position.
    """

    worker_id: str
    name: str
    address: str
    host: str
    state: str
    waiting_requests: int
    running_requests: int
    queued_tokens: int
    step_seconds: float
    kv_pages_free: int
    kv_pages_total: int
    block_bytes: int
    block_bytes_limit: int
    segments: tuple[ResidentRun, ...] = ()


@dataclass(frozen=True, slots=True)
class RunningStep:
    """One worker on a path, and the positions that it executes."""

    worker_id: str
    name: str
    first_position: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class RunningPath:
    """Workers that this many requests run along."""

    steps: tuple[RunningStep, ...]
    requests: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What a router knows of its cluster.

    Attributes:
        workers: those with a live lease, by name.
        placement_version: of the placement that the controller last wrote; 0 when there is none.
        failovers: how often this router's requests went on along another path.
        paths: of this router's running requests, the busiest first.
    """

    workers: tuple[WorkerStatus, ...]
    placement_version: int
    failovers: int
    paths: tuple[RunningPath, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What a server holds and does.

    Attributes:
        version: of the program.
        uptime_seconds: since it started.
        zoo_url: the zoo it serves.
        device: where the engine computes.
        waiting_requests, running_requests: in the engine.
        passes: passes the engine has made.
        kv_pages_total, kv_pages_used, kv_bytes_total: the KV pool.
        block_bytes: bytes of blocks in memory.
        chains: what is loaded.
        segments: how the loaded chains share base blocks.
        kv_pages_cached: pages kept by the prefix cache alone.
        prefix_queried_tokens, prefix_hit_tokens: prompt tokens looked up in the prefix cache, and found.
        preemptions: how often a running request gave up its pages for a while.
        chain_evictions: how often an idle chain was unloaded to make room.
        cluster: what a cluster's router knows of it; None where one process serves alone.
    """

    version: str
    uptime_seconds: float
    zoo_url: str
    device: str
    waiting_requests: int
    running_requests: int
    passes: int
    kv_pages_total: int
    kv_pages_used: int
    kv_bytes_total: int
    block_bytes: int
    chains: tuple[LoadedChain, ...]
    segments: tuple[SegmentReport, ...]
    kv_pages_cached: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    chain_evictions: int = 0
    cluster: ClusterStatus | None = None
