"""Desired placement: which worker is to hold which runs of which chains. Pure, no I/O.

Chains go whole to one worker where they fit, so that they need no hop; to the worker that has to load the
least for them, so that variants lie where their trunk is; hot ones get replicas by their share of the load;
what is there stays. docs/placement.md has the goals in formulas and says what this does not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from blockserve.common.api.cluster import Assignment, Run, WorkerId
from blockserve.controller.placement.catalog import Catalog
from blockserve.controller.placement.demand import Demand
from blockserve.controller.placement.fill import Filling, Pinned
from blockserve.controller.placement.ledger import Ledger
from blockserve.controller.placement.report import report
from blockserve.controller.placement.words import Pin, PlacementConfig, PlacementPlan, PlacementProblem


def place(problem: PlacementProblem, config: PlacementConfig | None = None) -> PlacementPlan:
    """The placement for a problem. `Placer` gives the same answers, faster from the second on."""
    return Placer(config).place(problem)


class Placer:
    """Places again and again, and works on what differs from the last time.

    Its answers do not depend on what it was asked before (a property test holds it to that). New or changed
    chains are read again as a whole; workers, traffic, wishes and assignments only where they differ.
    """

    def __init__(self, config: PlacementConfig | None = None) -> None:
        self.config = config or PlacementConfig()
        self._ledger: Ledger | None = None
        self._last: Mapping[WorkerId, tuple[Assignment, ...]] = {}

    def place(self, problem: PlacementProblem) -> PlacementPlan:
        """The placement for a problem.

        Raises:
            KeyError: `block_bytes` lacks a block of a chain.
        """
        evicted = problem.wishes.evicted
        chains = {chain: links for chain, links in problem.chains.items() if links and chain not in evicted}
        problem = replace(problem, chains=chains)
        ledger = self._ledger_for(problem)
        ledger.take_workers(problem.workers, self.config.headroom)
        self._take_present(ledger, problem)
        demand = Demand(problem, self.config)
        ledger.begin(demand.load_per_link)
        ledger.take_bars(problem.wishes.barred)
        pinned, refused = _pin(ledger, problem.wishes.pins)
        filling = Filling(problem, self.config, ledger, demand, pinned)
        filling.run()
        workers = {worker: _assignments(ledger, worker, pinned, self._last) for worker in problem.workers}
        self._ledger, self._last = ledger, workers
        return PlacementPlan(workers, report(problem, ledger, demand, filling.left_out, refused))

    def _ledger_for(self, problem: PlacementProblem) -> Ledger:
        ledger = self._ledger
        self._ledger = None  # until this placement is complete: an error leaves nothing half changed behind
        if (
            ledger is not None
            and ledger.fits(problem.workers)
            and ledger.catalog.is_of(problem.chains, problem.block_bytes)
        ):
            return ledger
        self._last = {}
        return Ledger(Catalog(problem.chains, problem.block_bytes), len(problem.workers))

    def _take_present(self, ledger: Ledger, problem: PlacementProblem) -> None:
        for worker, slot in ledger.slots.items():
            present = problem.present.get(worker, ())
            if self._last.get(worker, ()) == present:
                continue
            for name in sorted(ledger.chains_at[slot]):
                ledger.clear(slot, ledger.catalog.chains[name])
            for one in present:
                chain = ledger.catalog.chains.get(one.chain)
                if (
                    chain
                    and one.run.end <= len(chain)
                    and chain.may_cut(one.run.first)
                    and chain.may_cut(one.run.end)
                ):
                    ledger.add(slot, chain, one.run)


def _pin(ledger: Ledger, pins: tuple[Pin, ...]) -> tuple[Pinned, tuple[Pin, ...]]:
    """Put into the ledger what is pinned, and say which pins cannot be."""
    pinned: Pinned = {}
    blocks: dict[int, set[int]] = {}
    refused: list[Pin] = []
    for pin in pins:
        slot, chain = ledger.slots.get(pin.worker), ledger.catalog.chains.get(pin.chain)
        run = pin.run or (chain.whole if chain else Run(0, 1))
        if (
            slot is None
            or chain is None
            or not all(map(chain.may_cut, (run.first, run.end)))
            or run.end > len(chain)
        ):
            refused.append(pin)
            continue
        needed = blocks.get(slot, set()) | set(chain.blocks_of(run))
        if sum(ledger.catalog.size_of[block] for block in needed) > ledger.room[slot]:
            refused.append(pin)
            continue
        blocks[slot] = needed
        pinned.setdefault((slot, chain.id), []).append(run)
        ledger.add(slot, chain, run)
    return pinned, tuple(refused)


def _assignments(
    ledger: Ledger, worker: WorkerId, pinned: Pinned, last: Mapping[WorkerId, tuple[Assignment, ...]]
) -> tuple[Assignment, ...]:
    slot = ledger.slots[worker]
    made = tuple(
        Assignment(chain, run, any(run.covers(kept) for kept in pinned.get((slot, chain), ())))
        for chain in sorted(ledger.chains_at[slot])
        for run in ledger.pieces[chain][slot]
    )
    before = last.get(worker)
    return before if before == made else made
