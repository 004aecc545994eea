"""Who holds which part of which chain, and what memory that takes: the state that placement changes.

Workers have slots, columns of the tables; a lost worker's slot is given to the next new one. A block counts
once per worker, however many chains use it there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from blockserve.common.api.cluster import Run, WorkerId
from blockserve.controller.placement.catalog import Catalog, CatalogChain
from blockserve.controller.placement.words import WorkerCapacity
from blockzoo.manifest import ChainId

Floats = npt.NDArray[np.float64]
Pieces = dict[int, list[Run]]
"""What of one chain each slot holds; the runs of a slot are in order and do not touch."""


class Ledger:
    """What every worker is to hold.

    Attributes:
        slots: by worker.
        pieces: by chain.
        chains_at: chains that a slot holds something of.
        used: bytes of blocks, [slots].
        room: most bytes of blocks; below 0 where no worker is, [slots].
        speed: [slots].
        rank: place of the worker among all by id, [slots].
        host: [slots].
        load: sum over what a slot holds of `load_per_link`, [slots].
        load_per_link: of each chain.
        barred: slots that are not to hold a chain, by chain.
    """

    def __init__(self, catalog: Catalog, workers: int) -> None:
        count = workers + workers // 4 + 4  # some to spare, so that a new worker does not rebuild everything
        self.catalog = catalog
        self.slots: dict[WorkerId, int] = {}
        self.names: list[WorkerId | None] = [None] * count
        self.pieces: dict[ChainId, Pieces] = {chain: {} for chain in catalog.chains}
        self.chains_at: list[set[ChainId]] = [set() for _ in range(count)]
        self.used = np.zeros(count)
        self.room = np.full(count, -1.0)
        self.speed = np.ones(count)
        self.rank = np.zeros(count)
        self.host = [""] * count
        self.load = np.zeros(count)
        self.load_per_link: Mapping[ChainId, int] = {}
        self.barred: dict[ChainId, set[int]] = {}
        self._uses: list[dict[int, int]] = [{} for _ in range(count)]
        self._held = np.zeros((catalog.shared, count), dtype=bool)
        self._own_holders: dict[int, set[int]] = defaultdict(set)
        self._changed: dict[tuple[int, int], int] = {}

    def fits(self, workers: Mapping[WorkerId, WorkerCapacity]) -> bool:
        """Whether there are slots for these workers."""
        return len(workers) <= len(self.names)

    def take_workers(self, workers: Mapping[WorkerId, WorkerCapacity], headroom: float) -> None:
        """Give up what lost workers held, and know the new ones."""
        for worker in [worker for worker in self.slots if worker not in workers]:
            slot = self.slots.pop(worker)
            for chain in sorted(self.chains_at[slot]):
                self.clear(slot, self.catalog.chains[chain])
            self.names[slot], self.room[slot] = None, -1.0
        free = iter([slot for slot, name in enumerate(self.names) if name is None])
        for rank, worker in enumerate(sorted(workers)):
            slot = self.slots[worker] if worker in self.slots else next(free)
            capacity = workers[worker]
            self.slots[worker], self.names[slot], self.host[slot] = slot, worker, capacity.host
            self.speed[slot], self.rank[slot] = max(capacity.speed, 1e-9), rank
            self.room[slot] = capacity.block_bytes * (1 - headroom) if capacity.block_bytes else np.inf

    def take_bars(self, barred: Iterable[tuple[WorkerId, ChainId]]) -> None:
        """Know which workers are not to hold a chain, and give up what they have of it."""
        self.barred = {}
        for worker, chain in sorted(barred):
            if worker in self.slots and chain in self.catalog.chains:
                slot = self.slots[worker]
                self.barred.setdefault(chain, set()).add(slot)
                self.clear(slot, self.catalog.chains[chain])

    @property
    def free(self) -> Floats:
        """Bytes that each slot has left; below 0 where no worker is, [slots]."""
        return self.room - self.used

    def begin(self, load_per_link: Mapping[ChainId, int]) -> None:
        """Count moved bytes from here, and loads anew."""
        self._changed.clear()
        self.load_per_link = load_per_link
        self.load[:] = 0
        for chain, pieces in self.pieces.items():
            for slot, runs in pieces.items():
                self.load[slot] += load_per_link[chain] * sum(map(len, runs))

    def moved_bytes(self) -> int:
        """Bytes that workers have to load which they did not hold at `begin`."""
        sizes = self.catalog.size_of
        return sum(sizes[block] for (_, block), change in self._changed.items() if change > 0)

    def add(self, slot: int, chain: CatalogChain, run: Run) -> None:
        """Have a slot hold a run; what it holds of the chain beside or inside it becomes one run with it."""
        runs = self.pieces[chain.id].setdefault(slot, [])
        if any(one.covers(run) for one in runs):
            return
        touching = [one for one in runs if one.first <= run.end and run.first <= one.end]
        merged = Run(
            min([run.first, *(one.first for one in touching)]), max([run.end, *(one.end for one in touching)])
        )
        self._use(slot, chain, merged)
        for one in touching:
            runs.remove(one)
            self._unuse(slot, chain, one)
        runs.append(merged)
        runs.sort()
        self.chains_at[slot].add(chain.id)

    def drop(self, slot: int, chain: CatalogChain, run: Run) -> None:
        """Have a slot give up one of its runs."""
        runs = self.pieces[chain.id][slot]
        runs.remove(run)
        self._unuse(slot, chain, run)
        if not runs:
            del self.pieces[chain.id][slot]
            self.chains_at[slot].discard(chain.id)

    def clear(self, slot: int, chain: CatalogChain) -> None:
        """Have a slot give up a chain."""
        for run in list(self.pieces[chain.id].get(slot, ())):
            self.drop(slot, chain, run)

    def freed_by(self, slot: int, chain: CatalogChain, run: Run) -> int:
        """Bytes that dropping a run would free."""
        uses, sizes = self._uses[slot], self.catalog.size_of
        return sum(sizes[block] for block in chain.blocks_of(run) if uses[block] == 1)

    def added(self, chain: CatalogChain, run: Run) -> Floats:
        """Bytes that each slot would have to load to hold a run, [slots]."""
        catalog = self.catalog
        shared, own = catalog.parts(chain, run)
        sizes = catalog.sizes[shared]
        total = float(sizes.sum()) + sum(catalog.size_of[block] for block in own)
        added: Floats = total - sizes @ self._held[catalog.row[shared]]
        for block in own:
            for slot in self._own_holders.get(block, ()):
                added[slot] -= catalog.size_of[block]
        return added

    def added_by_link(self, chain: CatalogChain, run: Run) -> Floats:
        """Bytes to load for the first 1, 2, ... links of a run, [links, slots]."""
        first = chain.offsets[run.first]
        blocks = chain.blocks[first : chain.offsets[run.end]]
        absent = np.repeat(self.catalog.sizes[blocks][:, None], len(self.names), axis=1)
        seen: set[int] = set()
        for number, block in enumerate(blocks):
            row = self.catalog.row_of[block]
            if block in seen:
                absent[number] = 0
            elif row >= 0:
                absent[number, self._held[row]] = 0
            else:
                absent[number, list(self._own_holders.get(block, ()))] = 0
            seen.add(block)
        ends = np.array(chain.offsets[run.first + 1 : run.end + 1]) - first
        summed: Floats = absent.cumsum(axis=0)[ends - 1]
        return summed

    def _use(self, slot: int, chain: CatalogChain, run: Run) -> None:
        self.load[slot] += self.load_per_link.get(chain.id, 0) * len(run)
        uses, catalog, used = self._uses[slot], self.catalog, 0
        for block in chain.blocks_of(run):
            count = uses.get(block, 0)
            uses[block] = count + 1
            if not count:
                used += catalog.size_of[block]
                if (row := catalog.row_of[block]) >= 0:
                    self._held[row, slot] = True
                else:
                    self._own_holders[block].add(slot)
                self._changed[slot, block] = self._changed.get((slot, block), 0) + 1
        self.used[slot] += used

    def _unuse(self, slot: int, chain: CatalogChain, run: Run) -> None:
        self.load[slot] -= self.load_per_link.get(chain.id, 0) * len(run)
        uses, catalog, used = self._uses[slot], self.catalog, 0
        for block in chain.blocks_of(run):
            uses[block] -= 1
            if not uses[block]:
                del uses[block]
                used += catalog.size_of[block]
                if (row := catalog.row_of[block]) >= 0:
                    self._held[row, slot] = False
                else:
                    self._own_holders[block].discard(slot)
                self._changed[slot, block] = self._changed.get((slot, block), 0) - 1
        self.used[slot] -= used
