"""What path assembly looks up, prepared once per view of the cluster so that a request costs little.

Candidates of a chain are kept until what is held where, or who is ready, changes; a new load report only
renews the costs. Digests of a chain's runs are kept for good (up to `most_chains` chains).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockserve.common.api.cluster import (
    WIRE_VERSION,
    ClusterView,
    Run,
    SegmentDigest,
    WorkerId,
    WorkerState,
    WorkerView,
    segment_digest,
)
from blockserve.router.paths.costs import CostModel, Floats, RequestSize, hop_latency, worker_costs
from blockzoo.manifest import ChainId, Link

PARTED_HOP_SECONDS = 10.0
"""A hop between workers that cannot reach each other: what it takes to find that out."""


class Assigned:
    """What this router has sent to workers, beside what these report.

    A report is up to a second old, and seen half a second after it was made. Which of our requests it has
    counted is not known, but they are at most as many as were in flight at one time since the report before
    it; what it says beyond that is other routers'. Of our own we know at any time.

    Attributes:
        requests: ours that have not ended.
        link_tokens: sent since each worker last reported another load, tokens times links.
    """

    def __init__(self) -> None:
        self.requests: dict[WorkerId, int] = {}
        self.link_tokens: dict[WorkerId, int] = {}
        self._peak: dict[WorkerId, int] = {}
        self._reported: dict[WorkerId, int] = {}

    def add(self, worker: WorkerId, run: Run, size: RequestSize) -> None:
        """Count a request in."""
        self.requests[worker] = self.requests.get(worker, 0) + 1
        self._peak[worker] = max(self._peak.get(worker, 0), self.requests[worker])
        tokens = max(size.prompt_tokens - size.cached_tokens.get(worker, 0), 0) * len(run)
        self.link_tokens[worker] = self.link_tokens.get(worker, 0) + tokens

    def remove(self, worker: WorkerId, run: Run, size: RequestSize) -> None:
        """A request has ended; a report may have replaced the tokens that it had added."""
        left = self.requests.pop(worker, 0) - 1
        if left > 0:
            self.requests[worker] = left
        if worker in self.link_tokens:
            tokens = max(size.prompt_tokens - size.cached_tokens.get(worker, 0), 0) * len(run)
            self.link_tokens[worker] = max(self.link_tokens[worker] - tokens, 0) if left > 0 else 0

    def crowd(self, worker: WorkerId, reported: float) -> float:
        """Requests at a worker that reported so many."""
        others = max(reported - self._reported.get(worker, 0), 0.0)
        return others + self.requests.get(worker, 0)

    def renew(self, worker: WorkerId) -> None:
        """The worker has reported again, or is gone."""
        self.link_tokens.pop(worker, None)
        self._reported[worker] = self._peak.pop(worker, 0)
        if worker in self.requests:
            self._peak[worker] = self.requests[worker]
        elif not self._reported[worker]:
            del self._reported[worker]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known here."""
        return not (self.requests or self.link_tokens or self._peak or self._reported)

    def workers(self) -> set[WorkerId]:
        """Those about which anything is known here."""
        return self.requests.keys() | self.link_tokens.keys() | self._peak.keys() | self._reported.keys()


@dataclass(frozen=True, slots=True)
class Parent:
    """A chain that another one has links of.

    Attributes:
        chain: names it.
        links: of it.
        shift: position p of the other chain is compared with p + `shift` here.
    """

    chain: ChainId
    links: tuple[Link, ...]
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """Who can run which part of a chain.

    Attributes:
        workers: numbers of workers in the index, ascending, [workers].
        borders: where a path may change workers, from 0 to the chain's length, [intervals + 1].
        held: whether a worker holds all links between two borders, [intervals, workers].
        liking: how far down a worker is among those that the base block at the interval's start would choose,
            in [0, 1), [intervals, workers].
        lengths: links between two borders, [intervals].
        is_covered: whether somebody holds each interval.
    """

    workers: npt.NDArray[np.int64]
    borders: tuple[int, ...]
    held: npt.NDArray[np.bool_]
    liking: Floats
    lengths: npt.NDArray[np.int64]
    is_covered: bool


class PathIndex:
    """A view of the cluster, prepared for `blockserve.router.paths.assemble.assemble`."""

    def __init__(
        self, view: ClusterView, model: CostModel | None = None, *, most_chains: int = 10_000
    ) -> None:
        self.model = model or CostModel()
        self.assigned = Assigned()
        self._most_chains = most_chains
        self._digests: OrderedDict[ChainId, dict[Run, SegmentDigest]] = OrderedDict()
        self._candidates: dict[ChainId, Candidates] = {}
        self._parents: dict[ChainId, tuple[Parent, ...]] = {}
        self._views: dict[WorkerId, WorkerView] = {}
        self._take_residency()
        self.update(view)

    def update(self, view: ClusterView, parted: Collection[tuple[WorkerId, WorkerId]] = ()) -> None:
        """Take a newer view.

        Args:
            view: the cluster.
            parted: workers that cannot reach each other.
        """
        ready = {name: view.workers[name] for name in sorted(view.workers) if _usable(view.workers[name])}
        before, self._views = self._views, ready
        for worker in self.assigned.workers():
            if worker not in ready or worker not in before or ready[worker].load != before[worker].load:
                self.assigned.renew(worker)
        if before.keys() != ready.keys() or any(
            ready[worker].segments != before[worker].segments for worker in ready
        ):
            self._take_residency()
        views = list(ready.values())
        self.costs = worker_costs(views, self._positions, self.model)
        self.latency, self.row = hop_latency(views, self.model) if views else (np.zeros((0, 0)),) * 2
        numbers = {worker: number for number, worker in enumerate(ready)}
        for one, other in parted:
            if one in numbers and other in numbers:
                pair = [numbers[one], numbers[other]]
                self.latency[pair, pair[::-1]] = PARTED_HOP_SECONDS

    def _take_residency(self) -> None:
        self._candidates.clear()
        self.ids = list(self._views)
        self._positions: list[int] = []
        self._holders: dict[SegmentDigest, list[int]] = {}
        runs: set[Run] = set()
        for number, view in enumerate(self._views.values()):
            for segment in view.segments:
                self._holders.setdefault(segment.digest, []).append(number)
            mine = {segment.run for segment in view.segments}
            runs |= mine
            self._positions.append(len({place for run in mine for place in range(run.first, run.end)}))
        self._runs = sorted(runs)
        self._salts = np.array([_hash(worker) for worker in self.ids], dtype=np.uint64)

    def splice(self, chain: ChainId, parents: tuple[Parent, ...]) -> None:
        """Have a chain run where its links are held as parts of these chains, of whose runs it has some."""
        if self._parents.get(chain) != parents:
            self._parents[chain] = parents
            self._candidates.pop(chain, None)

    def candidates(self, chain: ChainId, links: Sequence[Link]) -> Candidates:
        """Who can run what of a chain."""
        found = self._candidates.get(chain)
        if found is None:
            found = self._candidates[chain] = self._find(chain, links)
        return found

    def _held(self, chain: ChainId, links: Sequence[Link]) -> list[tuple[Run, list[int]]]:
        """Runs of a chain that are held as they are, with the numbers of their workers."""
        digests = self._digests.setdefault(chain, {})
        self._digests.move_to_end(chain)
        if len(self._digests) > self._most_chains:
            self._digests.popitem(last=False)
        held: list[tuple[Run, list[int]]] = []
        for run in self._runs:
            if run.end > len(links):
                continue
            if run not in digests:
                digests[run] = segment_digest(links, run.first, run.end)
            if holders := self._holders.get(digests[run]):
                held.append((run, holders))
        return held

    def _find(self, chain: ChainId, links: Sequence[Link]) -> Candidates:
        held = self._held(chain, links)
        for parent in self._parents.get(chain, ()):
            for run, holders in self._held(parent.chain, parent.links):
                held += [(part, holders) for part in _common(links, parent, run)]
        borders = _borders(held, len(links))
        workers = np.array(sorted({number for _, holders in held for number in holders}), dtype=np.int64)
        positions = np.zeros((len(links), len(workers)), dtype=bool)
        for run, holders in held:
            positions[run.first : run.end, np.searchsorted(workers, holders)] = True
        table = np.logical_and.reduceat(positions, borders[:-1], axis=0)
        blocks = np.array([_hash(links[border].base) for border in borders[:-1]], dtype=np.uint64)
        return Candidates(
            workers,
            tuple(borders),
            table,
            liking=_mix(blocks[:, None] ^ self._salts[workers][None, :]),
            lengths=np.diff(borders),
            is_covered=bool(table.any(axis=1).all()),
        )


def _common(links: Sequence[Link], parent: Parent, run: Run) -> list[Run]:
    """The runs of a chain that are what its parent has in a run, as positions of the chain."""
    first = max(run.first - parent.shift, 0)
    end = min(run.end - parent.shift, len(links))
    equal = [place for place in range(first, end) if links[place] == parent.links[place + parent.shift]]
    starts = [place for place in equal if place - 1 not in equal]
    ends = [place + 1 for place in equal if place + 1 not in equal]
    return [Run(*pair) for pair in zip(starts, ends, strict=True)]


def _borders(held: Sequence[tuple[Run, object]], length: int) -> list[int]:
    """Where a path may change workers: at the ends of runs, but never so that a run has no layer.

    The embedding alone, and the head alone, is nothing that a worker executes; the next position is.
    """
    inner = {end for run, _ in held for end in (run.first, run.end)}
    inner |= {2 for end in inner if end == 1} | {length - 2 for end in inner if end == length - 1}
    return sorted({0, length} | {end for end in inner if 1 < end < length - 1})


def _usable(view: WorkerView) -> bool:
    return view.record.state is WorkerState.READY and view.record.wire_version == WIRE_VERSION


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(values: npt.NDArray[np.uint64]) -> Floats:
    """Numbers in [0, 1) that change wholly with every bit (the finaliser of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return (values >> np.uint64(11)).astype(np.float64) / 2.0**53
