"""What placement is given and what it answers. Frozen values, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blockserve.common.api.cluster import Assignment, Run, WorkerId
from blockzoo.manifest import BlockId, ChainId, Link


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker has to offer.

    Attributes:
        block_bytes: most bytes of blocks it may hold; 0 when it sets no bound.
        speed: relative to others.
        host: machine it runs on.
    """

    block_bytes: int = 0
    speed: float = 1.0
    host: str = ""


@dataclass(frozen=True, slots=True)
class Pin:
    """A worker is to hold a chain, or a run of it, whatever placement would choose."""

    worker: WorkerId
    chain: ChainId
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What people have asked for.

    Attributes:
        pins: go before everything else.
        replicas: of chains, in place of what their traffic asks for.
        evicted: chains that nobody is to hold.
        barred: workers that are not to hold a chain; pins go before them.
    """

    pins: tuple[Pin, ...] = ()
    replicas: Mapping[ChainId, int] = field(default_factory=dict)
    evicted: frozenset[ChainId] = frozenset()
    barred: frozenset[tuple[WorkerId, ChainId]] = frozenset()


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """What placement weighs.

    Attributes:
        headroom: share of a worker's memory for blocks that is left free for what comes.
        least_replicas: of every chain, while there is room and there are workers.
        fair_loads_per_replica: a chain gets a replica for every so many fair shares of the whole load (a fair
            share is what each worker has when all have the same).
        surplus: a replica is given up when the traffic asks for fewer even if multiplied by this.
        most_replicas: of one chain by traffic; wishes may ask for more.
        overload: times its fair share that a worker may have while another has room.
        bytes_per_hop: bytes that may be moved to take one hop from each of all requests.
    """

    headroom: float = 0.0
    least_replicas: int = 1
    fair_loads_per_replica: float = 1.0
    surplus: float = 1.25
    most_replicas: int = 64
    overload: float = 1.25
    bytes_per_hop: float = 1e13


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """All that placement depends on.

    Attributes:
        chains: links by id.
        block_bytes: of every block in them.
        workers: that are alive.
        traffic: of each chain in requests/s or any other weight; 0 when it is not named.
        present: what workers hold or are about to.
        wishes: of people.
    """

    chains: Mapping[ChainId, Sequence[Link]]
    block_bytes: Mapping[BlockId, int]
    workers: Mapping[WorkerId, WorkerCapacity]
    traffic: Mapping[ChainId, float] = field(default_factory=dict)
    present: Mapping[WorkerId, tuple[Assignment, ...]] = field(default_factory=dict)
    wishes: Wishes = field(default_factory=Wishes)


@dataclass(frozen=True, slots=True)
class PlacementReport:
    """What a placement means.

    Attributes:
        moved_bytes: that workers have to load.
        held_bytes: of blocks in all workers together.
        hops: of the chains whose cheapest path has any, by chain.
        mean_hops: over chains by traffic (each the same when there is none); of chains that have a path.
        left_out: chains or parts that fit nowhere, and why.
        short: chains that have fewer replicas than people asked for, and how many they have.
        refused_pins: that name what is not there, or do not fit.
    """

    moved_bytes: int
    held_bytes: int
    hops: Mapping[ChainId, int]
    mean_hops: float
    left_out: Mapping[ChainId, str]
    short: Mapping[ChainId, int]
    refused_pins: tuple[Pin, ...]


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """Assignments of every worker that is alive, in order, and what they mean."""

    workers: Mapping[WorkerId, tuple[Assignment, ...]]
    report: PlacementReport
