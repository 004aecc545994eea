"""What the processes of a cluster tell each other about workers, blocks and placement. Frozen values, no I/O.

A worker holds runs of a chain's links: positions `first` to `end` (0 is the embedding, `end` is one past the
last). What it holds is named by content, so a variant whose links are the same in a run is served by every
worker that holds the run, whichever variant it was loaded for.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType

from blockzoo.manifest import ChainId, Link

WIRE_VERSION = 2
"""Of the messages between routers and workers; see docs/compatibility.md."""

WorkerId = NewType("WorkerId", str)
"""Names one life of a worker process: a restarted worker has another id."""
SegmentDigest = NewType("SegmentDigest", str)
"""32 hex digits: what a run of links is, wherever it is held; see `segment_digest`."""


def segment_digest(links: Sequence[Link], first: int, end: int) -> SegmentDigest:
    """The digest of the links first .. end - 1 of a chain, adapters and positions included."""
    state = hashlib.blake2b(f"{first}:{end}".encode(), digest_size=16)
    for link in links[first:end]:
        state.update(f"|{link.base}+{','.join(link.applied)}".encode())
    return SegmentDigest(state.hexdigest())


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """Positions `first` to `end` - 1 of a chain."""

    first: int
    end: int

    def __post_init__(self) -> None:
        """Refuse what covers nothing."""
        if not 0 <= self.first < self.end:
            raise ValueError(f"a run from {self.first} to {self.end} covers nothing")

    def __len__(self) -> int:
        return self.end - self.first

    def covers(self, other: Run) -> bool:
        """Whether all of the other lies inside."""
        return self.first <= other.first and other.end <= self.end

    def overlap(self, other: Run) -> Run | None:
        """The positions of both; None when there are none."""
        first, end = max(self.first, other.first), min(self.end, other.end)
        return Run(first, end) if first < end else None


@dataclass(frozen=True, slots=True, order=True)
class ChainSpan:
    """A run of one chain, as a worker loads and executes it."""

    chain: ChainId
    run: Run


@dataclass(frozen=True, slots=True)
class PathStep:
    """One worker on the path of a request, and the positions it executes.

    Attributes:
        worker: which life of which worker.
        address: where its gRPC server listens.
        run: positions of the chain.
    """

    worker: WorkerId
    address: str
    run: Run


@dataclass(frozen=True, slots=True)
class ResidentSegment:
    """A run of links in a worker's memory."""

    digest: SegmentDigest
    run: Run


class WorkerState(enum.StrEnum):
    """What a worker is willing to do."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker is; the same for its whole life but for `state`.

    Attributes:
        id: of this life.
        name: stable over restarts, for people and manual placement.
        address: where its gRPC server listens.
        state: whether it takes new requests.
        wire_version: see `WIRE_VERSION`.
        kv_fingerprint: layout of its KV pages; only equal ones can be transferred.
        block_bytes: most bytes of blocks it may hold; 0 when it sets no bound.
        speed: relative to others; a worker of speed 2 takes half the time for a segment.
        host: machine it runs on; hops inside one are cheap.
    """

    id: WorkerId
    name: str
    address: str
    state: WorkerState = WorkerState.READY
    wire_version: int = WIRE_VERSION
    kv_fingerprint: str = ""
    block_bytes: int = 0
    speed: float = 1.0
    host: str = ""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How busy a worker is; measured by itself.

    Attributes:
        waiting_requests, running_requests: spans of requests it has.
        queued_tokens: tokens that wait to be computed.
        step_seconds: time of one pass, a moving mean; 0 while nothing was measured.
        step_requests: requests in these passes, the same mean; 0 when the worker does not say.
        step_crowding: share of a lone request's pass by which each further one lengthens it; 0 while nothing
            was measured.
        prefill_tokens_per_second: a moving mean; 0 while nothing was measured.
        kv_pages_free, kv_pages_total: of all pools.
        block_bytes_used: bytes of blocks in memory.
        hop_seconds: to each peer it has links to, by worker id: one way, a moving mean.
        kv_token_bytes: bytes of the keys and values of one token at one layer, of the widest chain.
        unreadable: chains that it could not read from the zoo a moment ago.
    """

    waiting_requests: int = 0
    running_requests: int = 0
    queued_tokens: int = 0
    step_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0
    kv_pages_free: int = 0
    kv_pages_total: int = 0
    block_bytes_used: int = 0
    hop_seconds: Mapping[WorkerId, float] = field(default_factory=dict)
    kv_token_bytes: int = 0
    step_requests: float = 0.0
    step_crowding: float = 0.0
    unreadable: tuple[ChainId, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker whose lease is alive, as others see it."""

    record: WorkerRecord
    load: LoadReport = LoadReport()
    segments: frozenset[ResidentSegment] = frozenset()


@dataclass(frozen=True, slots=True, order=True)
class Assignment:
    """A run of a chain that a worker is to hold.

    Attributes:
        chain: whose links to read.
        run: which of them.
        pinned: never given up to make room.
    """

    chain: ChainId
    run: Run
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """What each worker is to hold.

    Attributes:
        version: grows with every write.
        workers: by worker id; a worker that is not named holds on to what it has.
    """

    version: int = 0
    workers: Mapping[WorkerId, tuple[Assignment, ...]] = field(default_factory=dict)

    def of(self, worker: WorkerId) -> Placement:
        """What it says of one worker."""
        named = {worker: self.workers[worker]} if worker in self.workers else {}
        return Placement(self.version, named)

    def changes(self, before: Placement) -> dict[WorkerId, tuple[Assignment, ...] | None]:
        """What it says otherwise than an earlier one, by worker; None for a worker it no longer names."""
        changed: dict[WorkerId, tuple[Assignment, ...] | None] = {
            worker: held for worker, held in self.workers.items() if before.workers.get(worker) != held
        }
        return changed | dict.fromkeys(before.workers.keys() - self.workers.keys())


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster at one moment.

    Attributes:
        workers: those with a live lease.
        placement: what the controller wants; version 0 when nobody has said.
    """

    workers: Mapping[WorkerId, WorkerView] = field(default_factory=dict)
    placement: Placement = Placement()

    def holders(self) -> dict[SegmentDigest, frozenset[WorkerId]]:
        """Which workers hold each resident segment."""
        found: dict[SegmentDigest, set[WorkerId]] = {}
        for worker, view in self.workers.items():
            for segment in view.segments:
                found.setdefault(segment.digest, set()).add(worker)
        return {digest: frozenset(workers) for digest, workers in found.items()}
