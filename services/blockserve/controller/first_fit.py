"""A plain placement: whole chains where they fit, most wanted first, cut only where they must be. Pure.

A chain goes to the worker that holds it already, or would need the fewest new bytes, and has room. One that
fits nowhere as a whole is cut into as few runs as the free memory allows. Chains that bring a worker more
than its share of the traffic get further replicas while there is room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from blockserve.common.cluster import Assignment, Placement, Run, WorkerId
from blockzoo.manifest import BlockId, ChainId, Link


@dataclass(frozen=True, slots=True)
class WantedChain:
    """A chain that should be in memory.

    Attributes:
        id, links: the chain.
        traffic: requests/s.
        replicas: wanted at least.
        pinned: never given up for another.
        on: workers it must be on, as a whole; empty leaves that open.
    """

    id: ChainId
    links: tuple[Link, ...]
    traffic: float = 0.0
    replicas: int = 1
    pinned: bool = False
    on: tuple[WorkerId, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerRoom:
    """A worker that can hold blocks.

    Attributes:
        id: of the worker.
        bytes: most it may hold; 0 for no bound.
        speed: relative to others.
    """

    id: WorkerId
    bytes: int = 0
    speed: float = 1.0


@dataclass(slots=True)
class _Filling:
    """A worker while it is being filled."""

    room: WorkerRoom
    used: int = 0
    traffic: float = 0.0
    blocks: set[tuple[BlockId, BlockId | None]] = field(default_factory=set)
    assigned: list[Assignment] = field(default_factory=list)

    def new_bytes(self, links: Iterable[Link], sizes: Mapping[BlockId, int]) -> int:
        """Bytes that these links would add."""
        return sum(sizes[name[1] or name[0]] for name in _blocks(links) - self.blocks)

    def fits(self, num_bytes: int) -> bool:
        """Whether so many more bytes have room."""
        return not self.room.bytes or self.used + num_bytes <= self.room.bytes

    def take(self, chain: WantedChain, run: Run, sizes: Mapping[BlockId, int], share: float) -> None:
        """Hold a run of a chain."""
        links = chain.links[run.first : run.end]
        self.used += self.new_bytes(links, sizes)
        self.blocks |= _blocks(links)
        self.traffic += share * len(run) / len(chain.links) / self.room.speed
        self.assigned.append(Assignment(chain.id, run, chain.pinned))


def first_fit(
    chains: Sequence[WantedChain],
    sizes: Mapping[BlockId, int],
    workers: Sequence[WorkerRoom],
    present: Placement,
) -> tuple[Placement, tuple[ChainId, ...]]:
    """Place chains on workers.

    Args:
        chains: what is wanted.
        sizes: bytes of every block and adapter.
        workers: where there is room.
        present: the placement to move little from.

    Returns:
        The placement (its version is the present one's), and the chains that did not fit.
    """
    filling = {room.id: _Filling(room) for room in sorted(workers, key=lambda room: room.id)}
    before = {
        worker: {one.chain: one.run for one in assigned} for worker, assigned in present.workers.items()
    }
    left_out: list[ChainId] = []
    total = sum(chain.traffic for chain in chains) or 1.0
    fair = sum(max(chain.traffic, 0.0) for chain in chains) / max(1, len(filling))
    for chain in sorted(chains, key=lambda one: (not one.pinned, -one.traffic, one.id)):
        wanted = max(chain.replicas, math.ceil(chain.traffic / total * len(filling) - 0.5), 1)
        for number in range(min(wanted, len(filling))):
            if not _place_whole(chain, sizes, filling, before, chain.traffic / wanted, fair):
                if number == 0 and not _place_cut(chain, sizes, filling):
                    left_out.append(chain.id)
                break
    placed = {worker: tuple(sorted(one.assigned)) for worker, one in filling.items()}
    return Placement(present.version, placed), tuple(left_out)


def _place_whole(
    chain: WantedChain,
    sizes: Mapping[BlockId, int],
    filling: Mapping[WorkerId, _Filling],
    before: Mapping[WorkerId, Mapping[ChainId, Run]],
    share: float,
    fair: float,
) -> bool:
    whole = Run(0, len(chain.links))
    best: tuple[tuple[object, ...], _Filling] | None = None
    for worker, one in filling.items():
        if any(assigned.chain == chain.id for assigned in one.assigned) or (
            chain.on and worker not in chain.on
        ):
            continue
        added = one.new_bytes(chain.links, sizes)
        if not one.fits(added):
            continue
        is_there = before.get(worker, {}).get(chain.id) == whole
        # A worker with its share of the traffic takes more only when the others have theirs too.
        rank = (one.traffic * one.room.speed >= fair > 0, not is_there, added, one.traffic, worker)
        if best is None or rank < best[0]:
            best = rank, one
    if best is None:
        return False
    best[1].take(chain, whole, sizes, share)
    return True


def _place_cut(
    chain: WantedChain, sizes: Mapping[BlockId, int], filling: Mapping[WorkerId, _Filling]
) -> bool:
    """Cut a chain into as few runs as the room allows, the roomiest worker first."""
    length, first = len(chain.links), 0
    runs: list[tuple[_Filling, Run]] = []
    free = list(filling.values())
    while first < length:
        reach = {id(one): _reach(chain, first, one, sizes) for one in free}
        one = max(free, key=lambda one: (reach[id(one)], -one.used), default=None)
        if one is None:
            return False
        # Neither the embedding alone nor the head alone is a run.
        end = length if reach[id(one)] == length else min(reach[id(one)], length - 2)
        if end < max(first + 1, 2):
            return False
        runs.append((one, Run(first, end)))
        free.remove(one)
        first = end
    for one, run in runs:
        one.take(chain, run, sizes, chain.traffic)
    return True


def _reach(chain: WantedChain, first: int, one: _Filling, sizes: Mapping[BlockId, int]) -> int:
    """How far a worker could hold a chain from a position on."""
    end = first
    while end < len(chain.links) and one.fits(one.new_bytes(chain.links[first : end + 1], sizes)):
        end += 1
    return end


def _blocks(links: Iterable[Link]) -> set[tuple[BlockId, BlockId | None]]:
    """Base blocks, and adapters with the base they go on."""
    found: set[tuple[BlockId, BlockId | None]] = set()
    for link in links:
        found.add((link.base, None))
        found.update((link.base, applied) for applied in link.applied)
    return found
