"""From what is there to what should be there: the steps of placement, each of which is repeated until none
changes anything, so that placing again changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from blockserve.common.api.cluster import Run
from blockserve.controller.placement.catalog import CatalogChain
from blockserve.controller.placement.coverage import coverage, hops_of, missing
from blockserve.controller.placement.demand import Demand
from blockserve.controller.placement.ledger import Ledger
from blockserve.controller.placement.search import Search
from blockserve.controller.placement.words import PlacementConfig, PlacementProblem
from blockzoo.manifest import ChainId

Pinned = dict[tuple[int, ChainId], list[Run]]
"""Runs that people want in a slot."""


class Filling:
    """One placement in the making.

    Attributes:
        left_out: chains that no worker, or workers, have room for.
    """

    def __init__(
        self,
        problem: PlacementProblem,
        config: PlacementConfig,
        ledger: Ledger,
        demand: Demand,
        pinned: Pinned,
    ) -> None:
        self._ledger, self._demand, self._pinned = ledger, demand, pinned
        self._config = config
        self._wished = problem.wishes.replicas.keys()
        self._search = Search(ledger, demand.fair * config.overload)
        self._chains = [ledger.catalog.chains[chain] for chain in demand.order]
        self.left_out: list[ChainId] = []

    def run(self) -> None:
        """Change the ledger."""
        for slot in sorted(self._ledger.slots.values(), key=lambda slot: self._ledger.rank[slot]):
            self._trim(slot)
        for chain in self._chains:
            self._drop_above(chain, self._demand.keep[chain.id])
        while True:
            changed = [self._rejoin(chain) for chain in self._chains if self._is_cut(chain)]
            changed.append(self._fill_first(self._chains))
            changed += [
                self._fill_more(chain) for chain in self._chains if self._demand.replicas[chain.id] > 1
            ]
            if self.left_out and not any(changed):
                changed.append(self._shed())
            if not any(changed):
                return

    def _trim(self, slot: int) -> None:
        """Give up runs until the rest has room: the least wanted first, of those that free any memory."""
        ledger = self._ledger
        while ledger.used[slot] > ledger.room[slot]:
            given = [
                (self._demand.share[name], name, run)
                for name in ledger.chains_at[slot]
                for run in ledger.pieces[name][slot]
                if run not in self._pinned.get((slot, name), ())
            ]
            if not given:
                return  # only what is pinned is left, and that was counted before
            given.sort()
            freeing = (one for one in given if ledger.freed_by(slot, ledger.catalog.chains[one[1]], one[2]))
            _, name, run = next(freeing, given[0])
            self._drop(slot, ledger.catalog.chains[name], run)

    def _drop(self, slot: int, chain: CatalogChain, run: Run) -> None:
        self._ledger.drop(slot, chain, run)
        for kept in self._pinned.get((slot, chain.id), ()):
            if run.covers(kept):
                self._ledger.add(slot, chain, kept)

    def _drop_above(self, chain: CatalogChain, level: int) -> list[tuple[int, Run]]:
        """Give up runs that lie wholly where more than `level` workers hold the chain; those given up."""
        dropped: list[tuple[int, Run]] = []
        ledger, pieces = self._ledger, self._ledger.pieces[chain.id]
        while len(pieces) > level:
            covered = coverage(chain, pieces)
            spare = [
                (
                    len(run),
                    -float(ledger.load[slot] / ledger.speed[slot]),
                    -float(ledger.rank[slot]),
                    slot,
                    run,
                )
                for slot, runs in pieces.items()
                for run in runs
                if (slot, chain.id) not in self._pinned and min(covered[run.first : run.end]) > level
            ]
            if not spare:
                break
            *_, slot, run = min(spare)
            ledger.drop(slot, chain, run)
            dropped.append((slot, run))
        return dropped

    def _is_cut(self, chain: CatalogChain) -> bool:
        pieces = self._ledger.pieces[chain.id]
        return len(pieces) > 1 and not any(chain.whole in runs for runs in pieces.values())

    def _rejoin(self, chain: CatalogChain) -> bool:
        """Put a chain that was cut on one worker that has room now, when that is worth the bytes."""
        ledger = self._ledger
        hops = hops_of(chain, ledger.pieces[chain.id])
        if not hops:
            return False
        worth = hops * self._demand.share[chain.id] * self._config.bytes_per_hop
        slot = self._search.nearest(chain, worth)
        if slot is None:
            return False
        ledger.add(slot, chain, chain.whole)
        self._drop_above(chain, self._demand.replicas[chain.id])
        return True

    def _fill_first(self, chains: Iterable[CatalogChain]) -> bool:
        """See that every position of every chain is somewhere."""
        changed = False
        self.left_out = []
        for chain in chains:
            if any(chain.whole in runs for runs in self._ledger.pieces[chain.id].values()):
                continue
            lacking = missing(chain, self._ledger.pieces[chain.id], 1)
            if not lacking:
                continue
            placed = self._place_all(chain, lacking, cut=True)
            if not placed and self._give_up(chain):
                changed = True  # what was given up makes room, if not for this chain
                placed = self._place_all(chain, missing(chain, self._ledger.pieces[chain.id], 1), cut=True)
            if placed:
                changed = True
            else:
                self.left_out.append(chain.id)
        return changed

    def _give_up(self, chain: CatalogChain) -> bool:
        """Drop the parts of a chain that cannot be completed; whether there were any."""
        parts = [(slot, run) for slot, runs in self._ledger.pieces[chain.id].items() for run in runs]
        loose = [(slot, run) for slot, run in parts if run not in self._pinned.get((slot, chain.id), ())]
        for slot, run in loose:
            self._drop(slot, chain, run)
        return bool(loose)

    def _fill_more(self, chain: CatalogChain) -> bool:
        """Give a chain its further replicas, as far as there is room; cut ones only where people asked."""
        changed = False
        replicas = 0 if chain.id in self.left_out else self._demand.replicas[chain.id]
        for level in range(2, replicas + 1):
            lacking = missing(chain, self._ledger.pieces[chain.id], level)
            if lacking and not self._place_all(chain, lacking, cut=chain.id in self._wished):
                break
            changed = changed or bool(lacking)
        return changed

    def _place_all(self, chain: CatalogChain, runs: list[Run], *, cut: bool) -> bool:
        """Place runs, all or none."""
        done: list[tuple[int, list[Run]]] = []
        for run in runs:
            slot = self._search.one_slot(chain, run)
            parts = [(slot, run)] if slot is not None else self._search.slots(chain, run) if cut else None
            if parts is None:
                for slot, before in reversed(done):
                    self._ledger.clear(slot, chain)
                    for one in before:
                        self._ledger.add(slot, chain, one)
                return False
            for slot, part in parts:
                done.append((slot, list(self._ledger.pieces[chain.id].get(slot, ()))))
                self._ledger.add(slot, chain, part)
        return True

    def _shed(self) -> bool:
        """Give up further replicas, if that makes room for a chain that has none; else leave all as it is."""
        dropped = [
            (chain, slot, run)
            for chain in self._chains
            if chain.id not in self._wished
            for slot, run in self._drop_above(chain, 1)
        ]
        chains = self._ledger.catalog.chains
        helped = bool(dropped) and self._fill_first([chains[chain] for chain in self.left_out])
        for chain, slot, run in dropped:
            others = self._ledger.pieces[chain.id].get(slot)
            if not others and self._ledger.added(chain, run)[slot] <= self._ledger.free[slot]:
                self._ledger.add(slot, chain, run)
        return helped
